"""Lists the checkpoints of one run, chooses the newest intact one to load, and removes old ones."""

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from maskmoe.checkpoint.integrity import check_structure, has_digests, iteration_of
from maskmoe.checkpoint.reading import LAYOUT_FILE, CheckpointError, UnfinishedCheckpointError
from maskmoe.errors import UserError
from maskmoe.files.outputs import sync_to_disk, write_text
from maskmoe.files.untrusted import UnusableFile, read_bounded

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_TRACKER_BYTES = 100
RELEASE = "release"
"""Megatron's name of a checkpoint that no training run saved, such as a converted checkpoint."""
_UNVERIFIED = "has no digests of its files (integrity.json), but an older checkpoint has"


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Return the folder of the checkpoint of an iteration, as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


@contextmanager
def temporary_load_folder(checkpoint: Path | None, args: Namespace) -> Iterator[None]:
    """Let `--load` be a folder with one checkpoint, or without any, while Megatron loads during the block.

    Megatron prefers the imported model that a tracker file names to `--ckpt-step`, and fails if the tracker file is
    unusable. Hide `--no-save-optim` and `--no-save-rng`, too: Megatron would not ask the checkpoint for these states,
    and then fail or exit with code 0.
    """
    hidden = dict.fromkeys(("load", "no_save_optim", "no_save_rng"))
    shown = {name: getattr(args, name) for name in hidden}
    with tempfile.TemporaryDirectory(prefix="maskmoe-load-") as folder:
        if checkpoint is not None:
            (Path(folder) / checkpoint.name).symlink_to(checkpoint.absolute())
            iteration = iteration_of(checkpoint)
            write_tracker(folder, RELEASE if iteration is None else iteration)
        vars(args).update(hidden | {"load": args.load and folder})
        try:
            yield
        finally:
            vars(args).update(shown)


def saved_iterations(folder: str | Path) -> list[int]:
    """Return the iterations of all checkpoints in a folder, intact or damaged, in descending order."""
    iterations = (iteration_of(path) for path in Path(folder).glob("iter_*") if path.is_dir())
    return sorted((iteration for iteration in iterations if iteration is not None), reverse=True)


def has_checkpoint(folder: str | Path) -> bool:
    """Return whether a run has saved a checkpoint in a folder, or has begun to."""
    return (Path(folder) / TRACKER).is_file() or bool(saved_iterations(folder))


def describe_missing(folder: str | Path) -> str:
    """Return the error about a folder without checkpoints, and what the folder holds instead."""
    if has_checkpoint(Path(folder) / "checkpoints"):
        return f"{folder} holds no checkpoint, but {Path(folder) / 'checkpoints'} does"
    return f"{folder} holds no checkpoint"


def write_tracker(folder: str | Path, iteration: int | str) -> None:
    """Record the newest checkpoint, an iteration or `RELEASE`, in Megatron's tracker file, atomically."""
    write_text(Path(folder) / TRACKER, str(iteration))


def read_tracker(folder: str | Path) -> int | str | None:
    """Return the iteration in Megatron's tracker file, or `RELEASE`; None if the file is missing or damaged."""
    try:
        text = read_bounded(Path(folder) / TRACKER, _MAX_TRACKER_BYTES).decode(errors="replace").strip()
    except UnusableFile:
        return None
    if text == RELEASE:
        return text
    return int(text) if text.isascii() and text.isdecimal() else None


def finished_iterations(folder: str | Path) -> list[int]:
    """Return the checkpoints' iterations up to the one in the tracker file, or all without a usable one, descending."""
    tracked = read_tracker(folder)
    return [step for step in saved_iterations(folder) if not isinstance(tracked, int) or step <= tracked]


def _candidates(folder: str | Path) -> list[Path]:
    """Return the checkpoints that a run may load, newest first, and a missing one that the tracker file names."""
    tracked = read_tracker(folder)
    if tracked == RELEASE:
        return [Path(folder) / RELEASE]
    iterations = finished_iterations(folder)
    if isinstance(tracked, int) and tracked not in iterations:
        iterations.insert(0, tracked)
    return [checkpoint_path(folder, iteration) for iteration in iterations]


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
    rejected: list[CheckpointError] = []
    without_digests: Choice | None = None  # the newest intact checkpoint without digests
    for candidate in candidates:
        try:
            check(candidate)
        except CheckpointError as fault:
            rejected.append(fault)
            continue
        choice = Choice(candidate, tuple(rejected))
        if has_digests(candidate) or not any(map(has_digests, candidates)):
            return choice
        without_digests = without_digests or choice
        rejected.append(CheckpointError(candidate, _UNVERIFIED))
    if without_digests is not None:
        return without_digests
    # Without a tracker file, no save was finished.
    is_without_saves = step is None and not (Path(folder) / TRACKER).exists()
    if is_without_saves and all(isinstance(fault, UnfinishedCheckpointError) for fault in rejected):
        return Choice(None, tuple(rejected))
    reasons = "; ".join(map(str, rejected)) or f"{TRACKER} names none that exists"
    raise UserError(f"{folder} holds no intact checkpoint: {reasons}")


def locate_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the folder of a checkpoint: `path` itself, or in a run's folder that of iteration `step`, else the newest.

    An older checkpoint never replaces a damaged one: the caller would not notice.

    Raises:
        UserError: The folder holds no checkpoint, or the newest checkpoint is damaged.
    """
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


def remove_old_checkpoints(
    folder: str | Path,
    keep: int | None,
    retain_interval: int | None = None,
    newest: int | None = None,
    is_dry_run: bool = False,
    check: Callable[[Path], None] = check_structure,
) -> list[Path]:
    """Remove all checkpoints that are older than the newest `keep` intact checkpoints, and return their folders.

    Checkpoints without digests count only if none has digests.

    Args:
        folder: The folder in Megatron's `--save`.
        keep: The number of intact checkpoints that stay; None keeps all.
        retain_interval: Megatron's `--save-retain-interval`; checkpoints at multiples of this iteration stay, too.
        newest: The newest iteration of the run. Later checkpoints were rejected on loading, or the run has gone back
            beyond them, so they neither count nor are removed. None counts all checkpoints.
        is_dry_run: Whether to remove nothing.
        check: Raises `CheckpointError` if a checkpoint is not intact.
    """
    iterations = [saved for saved in saved_iterations(folder) if newest is None or saved <= newest]
    # The check of a checkpoint opens thousands of files, while all ranks wait.
    if keep is None or len(iterations) <= keep:
        return []
    checkpoints = [checkpoint_path(folder, iteration) for iteration in iterations]
    needs_digests = any(map(has_digests, checkpoints))
    kept, old = [], []
    for iteration, checkpoint in zip(iterations, checkpoints, strict=True):
        if len(kept) < keep:
            with suppress(CheckpointError):
                check(checkpoint)
                kept += [checkpoint] if has_digests(checkpoint) or not needs_digests else []
        elif not (retain_interval and iteration % retain_interval == 0) and not checkpoint.is_symlink():
            old.append(checkpoint)
    if old and not is_dry_run:
        # The writer has synchronized the tensors, but not the small files. A loss of power could otherwise leave them
        # empty, and the old checkpoints removed. Before 2.14, torch synchronized .metadata while it was empty.
        small_files = [path for checkpoint in kept for path in (*checkpoint.glob("*.json"), checkpoint / LAYOUT_FILE)]
        for path in (*small_files, *kept, Path(folder)):
            with suppress(OSError):  # some network file systems cannot synchronize folders
                sync_to_disk(path)
        for checkpoint in old:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return old
