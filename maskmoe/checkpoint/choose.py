"""Chooses the checkpoint to load: the newest intact one of a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskmoe.checkpoint.errors import CheckpointError, UnfinishedCheckpointError
from maskmoe.checkpoint.integrity import check_structure, has_digests, iteration_of
from maskmoe.checkpoint.reading import LAYOUT_FILE
from maskmoe.checkpoint.series import (
    RELEASE,
    TRACKER,
    checkpoint_path,
    describe_missing,
    finished_iterations,
    read_tracker,
)
from maskmoe.errors import UserError
from maskmoe.files.paths import check_folder

_UNVERIFIED = "has no digests of its files (integrity.json), but an older checkpoint has"


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load, None if the folder has none, and the faults of newer, rejected checkpoints."""

    checkpoint: Path | None
    rejected: tuple[CheckpointError, ...] = ()

    @property
    def iteration(self) -> int | None:
        """Return the iteration of the checkpoint; None for a `release` checkpoint, or without a checkpoint."""
        return None if self.checkpoint is None else iteration_of(self.checkpoint)


def choose_checkpoint(
    folder: str | Path, step: int | None = None, check: Callable[[Path], None] = check_structure
) -> Choice:
    """Choose the newest intact checkpoint in a folder; one without digests only if no intact one has digests.

    The search starts with the checkpoint that the tracker file names, or without a usable tracker file with the newest
    one, and continues with older checkpoints. A folder in which only the first save was interrupted counts as empty.

    Args:
        folder: The folder in Megatron's `--load`.
        step: Megatron's `--ckpt-step`, the only iteration to choose; None to choose among all.
        check: Raises `CheckpointError` if a checkpoint is not intact.

    Raises:
        UserError: The folder has checkpoints, or a record of one, but none is intact.
    """
    candidates = [checkpoint_path(folder, step)] if step is not None else _candidates(folder)
    faults: dict[Path, CheckpointError] = {}
    for candidate in sorted(candidates, key=has_digests, reverse=True):  # which keeps the order among equals
        fault = _fault_of(candidate, check)
        if fault is None:
            newer = candidates[: candidates.index(candidate)]
            for path in newer:
                if path not in faults:
                    faults[path] = _fault_of(path, check) or CheckpointError(path, _UNVERIFIED)
            return Choice(candidate, tuple(faults[path] for path in newer))
        faults[candidate] = fault
    rejected = tuple(faults[candidate] for candidate in candidates)
    # Without a tracker file, no save was finished.
    is_without_saves = step is None and not (Path(folder) / TRACKER).exists()
    if is_without_saves and all(isinstance(fault, UnfinishedCheckpointError) for fault in rejected):
        return Choice(None, rejected)
    reasons = "; ".join(map(str, rejected)) or f"{TRACKER} names none that exists"
    raise UserError(f"{folder} holds no intact checkpoint: {reasons}")


def _fault_of(checkpoint: Path, check: Callable[[Path], None]) -> CheckpointError | None:
    """Return the fault that a check finds; None if there is none."""
    try:
        check(checkpoint)
    except CheckpointError as fault:
        return fault
    return None


def locate_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the folder of a checkpoint: `path` itself, or in a run's folder that of iteration `step`, else the newest.

    An older checkpoint never replaces a damaged one: the caller would not notice.

    Raises:
        UserError: The folder does not exist or holds no checkpoint, or the newest checkpoint is damaged.
    """
    check_folder(path)
    if (path / LAYOUT_FILE).is_file():
        if step not in (None, iteration_of(path)):
            raise UserError(f"--ckpt-step {step} chooses among the checkpoints of a run, but {path} is a checkpoint")
        return path
    choice = choose_checkpoint(path, step)
    if choice.checkpoint is None:
        raise UserError(describe_missing(path))
    if choice.rejected:
        raise UserError(f"{choice.rejected[0]}; to use an older checkpoint, name its folder: {choice.checkpoint}")
    return choice.checkpoint


def _candidates(folder: str | Path) -> list[Path]:
    """Return the checkpoints that a run may load, newest first, and a missing one that the tracker file names."""
    tracked = read_tracker(folder)
    if tracked == RELEASE:
        return [Path(folder) / RELEASE]
    iterations = finished_iterations(folder)
    if isinstance(tracked, int) and tracked not in iterations:
        iterations.insert(0, tracked)
    return [checkpoint_path(folder, iteration) for iteration in iterations]
