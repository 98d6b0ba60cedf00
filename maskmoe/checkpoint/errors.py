"""The faults of checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from maskmoe.errors import UserError


@dataclass(eq=False)
class CheckpointError(UserError):
    """A fault of a checkpoint: its folder, and a clause that follows the folder's path, such as "does not exist"."""

    checkpoint: Path
    fault: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.fault}"


class UnfinishedCheckpointError(CheckpointError):
    """The fault of a checkpoint whose saving was interrupted."""
