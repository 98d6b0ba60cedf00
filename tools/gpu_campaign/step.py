"""The definition of a step: its commands, and how its findings are read from the files that the commands write."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpu_campaign.results import Findings
from maskmoe.launch.machine import Devices


@dataclass(frozen=True)
class Context:
    """The checkout, the output folder and the machine of a campaign.

    Attributes:
        root: the checkout.
        output: the folder for results.
        devices: the GPUs and cores of this machine.
        has_transformer_engine: whether Transformer Engine is installed.
    """

    root: Path
    output: Path
    devices: Devices
    has_transformer_engine: bool

    @property
    def is_dry_run(self) -> bool:
        """Whether there is no GPU, so that steps are only tried on the CPU."""
        return not self.devices.num_gpus

    @property
    def num_ranks(self) -> int:
        """The number of ranks of a step on all GPUs; two in a dry run."""
        return self.devices.num_gpus or 2

    @property
    def minutes(self) -> int:
        """The time that a campaign takes at most by default; a dry run may share a slow machine with other work."""
        return 10 if self.devices.num_gpus == 1 else 30

    def folder(self, step: str) -> Path:
        """Return the folder for the files of a step, which exists."""
        folder = self.output / step
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and variables that are set in addition to those of this process."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.words)])


@dataclass(frozen=True)
class Step:
    """One step of a campaign.

    Attributes:
        name: a short word, which names the folder of the step's files.
        title: what the step shows.
        share: the part of the campaign's time that the step may take, in addition to what earlier steps left of theirs.
        commands: returns the commands, which run one after the other.
        read: returns what the files of the finished commands say.
        measures: whether the numbers only mean something on a GPU. Without a GPU, they are discarded.
        needs: the steps whose files the step reads.
    """

    name: str
    title: str
    share: float
    commands: Callable[[Context], Sequence[Command]]
    read: Callable[[Context], Findings]
    measures: bool = False
    needs: tuple[str, ...] = ()
