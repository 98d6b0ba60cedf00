"""The definitions of a stage and of a plan of stages."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from maskmoe.workflow.files import StageFiles


@dataclass(frozen=True)
class Stage:
    """One command with the files that the command reads and writes.

    Attributes:
        name: a short word, which also names the log.
        command: program and arguments, run in the user's current folder; paths are absolute.
        inputs: files and folders that determine the result, together with the command.
        outputs: files and folders that the command makes.
        byproducts: further files and folders that the command makes. Byproducts are set aside together with the
            outputs when the stage is repeated.
        scratch: folders that are removed before every start, because an interrupted command may leave incomplete files
            in them.
        environment: variables that are set in addition to the variables of this process.
        machine_flags: names of flags that adapt the command to the machine. A change of these flags alone does not
            repeat the stage.
        is_resumable: whether the command, started again, continues from its own outputs.
        seq_length: tokens in a sample if the command trains, from which the speed of training is computed.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    byproducts: tuple[Path, ...] = ()
    scratch: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    machine_flags: frozenset[str] = frozenset()
    is_resumable: bool = False
    seq_length: int = 0


StageMaker = Callable[[], Stage]
"""Makes a stage, at a time when all stages before are finished: the command may depend on their outputs."""


class Plan(Protocol):
    """Stages in order."""

    @property
    def files(self) -> StageFiles:
        """Where the stages keep their files."""
        ...

    @property
    def stages(self) -> tuple[StageMaker, ...]:
        """Makers of all stages, in order."""
        ...


def maskmoe_command(subcommand: str, *arguments: object) -> tuple[str, ...]:
    """Return the command line of `maskmoe SUBCOMMAND ARGUMENTS…`."""
    return (sys.executable, "-m", "maskmoe", subcommand, *map(str, arguments))
