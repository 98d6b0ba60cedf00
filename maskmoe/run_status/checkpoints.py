"""Reads the checkpoints of a run, and whether they are intact."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from maskmoe.checkpoint.errors import CheckpointError
from maskmoe.checkpoint.integrity import COMPLETION_FILE, check_content, check_structure, has_digests
from maskmoe.checkpoint.series import checkpoint_path, saved_iterations
from maskmoe.errors import one_line


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint.

    Attributes:
        path: Its folder.
        size: The size of its files in bytes.
        saved: When it was completed, or last changed, in seconds since 1970.
        state: `complete` if all files have their full size, `verified` if the files also have the content that was
            saved, else what is wrong.
    """

    path: Path
    size: int
    saved: float
    state: str


def read_checkpoints(folder: Path, verify: bool) -> Iterator[SavedCheckpoint]:
    """Yield the checkpoints in a folder, the newest first. Checkpoints that are removed meanwhile are left out.

    Args:
        folder: The folder of the checkpoints.
        verify: Whether to compare all files with their digests, which reads all of their bytes.
    """
    iterations = sorted(saved_iterations(folder), reverse=True)
    for iteration in tqdm(iterations, "verifying", unit="checkpoint", disable=not verify, leave=False):
        path = checkpoint_path(folder, iteration)
        with suppress(OSError):
            files = [file.stat().st_size for file in path.iterdir() if file.is_file()]
            completed = path / COMPLETION_FILE
            saved = (completed if completed.exists() else path).stat().st_mtime
            yield SavedCheckpoint(path, sum(files), saved, _state(path, verify))


def _state(path: Path, verify: bool) -> str:
    """Return the state of a checkpoint, see `SavedCheckpoint`."""
    try:
        check_structure(path)
        if verify:
            check_content(path)
    except CheckpointError as error:
        return f"damaged: {one_line(error.fault)}"
    if not has_digests(path):
        return "complete, without digests"
    return "verified" if verify else "complete"
