"""The record of a run's rewinds: which iterations the run passes over, and which checkpoints are abandoned."""

import json
from argparse import Namespace
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import read_json_bytes

FILE_NAME = "rewinds.json"
"""Name of the record in a run folder."""

_LARGEST_ITERATION = 1 << 40
_LONGEST_RANGE = 1 << 20


@dataclass(frozen=True)
class Rewind:
    """One time that a run went back.

    Attributes:
        first: The first iteration that the run passes over, counted from 1 as in the log. The run went back to a
            checkpoint of an earlier iteration.
        last: The last iteration that the run passes over.
        cause: The reason in words, on one line.
    """

    first: int
    last: int
    cause: str

    @property
    def iterations(self) -> range:
        """The iterations that the run passes over."""
        return range(self.first, self.last + 1)

    def __str__(self) -> str:
        return f"iteration {self.last}" if self.first == self.last else f"iterations {self.first}-{self.last}"


@dataclass(frozen=True)
class Rewinds:
    """All rewinds of a run.

    Attributes:
        all: The rewinds in the order in which they happened.
    """

    all: tuple[Rewind, ...] = ()

    @property
    def passed(self) -> set[int]:
        """The iterations that the run passes over."""
        return {iteration for rewind in self.all for iteration in rewind.iterations}

    def abandoned_by(self, iteration: int, passed: Collection[int]) -> Rewind | None:
        """Return the rewind that went back beyond a checkpoint; None if the run may resume from the checkpoint.

        Args:
            iteration: The iteration of the checkpoint.
            passed: The iterations that the run passed over when it saved the checkpoint.
        """
        for rewind in self.all:
            if any(step <= iteration and step not in passed for step in rewind.iterations):
                return rewind
        return None

    def write(self, folder: Path) -> None:
        """Write the record of a run, atomically.

        Raises:
            UserError: the folder does not exist or cannot be written.
            OSError: the disk is full, or the file system fails.
        """
        with atomic_output(folder / FILE_NAME) as path:
            path.write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """Return the record as JSON."""
        return json.dumps([asdict(rewind) for rewind in self.all], indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Rewinds":
        """Return the record in a JSON text.

        Raises:
            ValueError, TypeError, KeyError, OverflowError: the text holds no such record.
        """
        rewinds = tuple(
            Rewind(int(entry["first"]), int(entry["last"]), " ".join(str(entry["cause"]).split()))
            for entry in json.loads(text)
        )
        for rewind in rewinds:
            if not 1 <= rewind.first <= rewind.last <= min(_LARGEST_ITERATION, rewind.first + _LONGEST_RANGE):
                raise ValueError(f"{rewind.first} to {rewind.last} is no range of iterations")
        return cls(rewinds)


NO_REWINDS = Rewinds()


def read_rewinds(folder: Path) -> Rewinds:
    """Read the record of a run; without a record, the run has never gone back.

    Args:
        folder: The run folder.

    Raises:
        UserError: The record is damaged.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return NO_REWINDS
    try:
        return Rewinds.from_json(read_json_bytes(path).decode())
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged: {error}. The file holds the iterations that the run passes over. Restore the file, or "
            "remove it to train on all iterations"
        ) from error


def loads_what_it_saves(args: Namespace) -> bool:
    """Return whether a run loads from the folder to which it saves.

    Args:
        args: Megatron's arguments.
    """
    return bool(args.save and args.load) and Path(args.save).resolve() == Path(args.load).resolve()
