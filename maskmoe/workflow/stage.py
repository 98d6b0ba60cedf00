"""What a stage is, what a plan of stages is, and where their files are."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[2]
"""The repository; stages run in it."""


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: a short word; names the log.
        command: program and arguments, run in the repository.
        inputs: files and folders that the result depends on.
        outputs: files and folders that it makes.
        byproducts: what else it makes; kept apart with the outputs when the stage is done again.
        scratch: folders that it may leave behind, removed before every start: what was cut off there must not be read.
        environment: variables set in addition to those of this process.
        machine_flags: names of flags that suit the command to the machine; other ones are no reason to do it again.
        continues: started again, it goes on from its own outputs.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    byproducts: tuple[Path, ...] = ()
    scratch: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    machine_flags: frozenset[str] = frozenset()
    continues: bool = False


@dataclass(frozen=True)
class StageFiles:
    """Files that every folder of stages has.

    Attributes:
        folder: the folder.
    """

    folder: Path

    @property
    def commands(self) -> Path:
        return self.folder / "commands.sh"

    @property
    def record(self) -> Path:
        return self.folder / "stages.json"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    @property
    def previous(self) -> Path:
        return self.folder / "previous"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def log(self, stage: str) -> Path:
        return self.logs / f"{stage}.log"


@dataclass(frozen=True)
class TrainingFiles(StageFiles):
    """Files that a folder has in which a model is trained and evaluated."""

    @property
    def routing_mask(self) -> Path:
        return self.folder / "routing_mask.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    @property
    def dataset_cache(self) -> Path:
        return self.folder / "dataset_cache"

    @property
    def evaluation(self) -> Path:
        return self.folder / "evaluation.json"


class Plan(Protocol):
    """Stages in order.

    A stage is asked for when all before it are finished: its command may depend on what they made.
    """

    @property
    def files(self) -> StageFiles:
        """Where the files of the stages are."""

    @property
    def stages(self) -> tuple[Callable[[], Stage], ...]:
        """Makers of all stages, in order."""

    @property
    def seq_length(self) -> int:
        """Tokens in a sample, for the speed of training."""


def tool_command(name: str, *arguments: object) -> tuple[str, ...]:
    """The command line of a tool of the repository."""
    return words(Path(sys.executable), f"tools/{name}.py", *arguments)


def words(*arguments: object) -> tuple[str, ...]:
    """Arguments as a command line has them; files of the repository relative to it."""
    return tuple(short_path(argument) if isinstance(argument, Path) else str(argument) for argument in arguments)


def short_path(path: Path) -> str:
    """The path as a command in the repository names it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
