"""Finds, chooses and removes the checkpoints of one run, persistent and non-persistent ones."""

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from maskmoe.checkpoint.integrity import (
    COMPLETION_FILE,
    LAYOUT_FILE,
    Damage,
    Unfinished,
    Unreadable,
    check_structure,
    iteration_of,
)
from maskmoe.errors import UserError
from maskmoe.files.outputs import sync_to_disk, write_text
from maskmoe.files.paths import check_folder
from maskmoe.files.untrusted import UnusableFile, read_bounded

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_TRACKER_BYTES = 100
RELEASE = "release"
"""Megatron's name of a checkpoint that no training run saved, such as a converted checkpoint."""


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load, None if the folder has none, and the faults of newer, rejected checkpoints."""

    checkpoint: Path | None
    rejected: tuple[Damage, ...] = ()

    @property
    def iteration(self) -> int | None:
        """Return the iteration of the checkpoint; None for a `release` checkpoint, or without a checkpoint."""
        return None if self.checkpoint is None else iteration_of(self.checkpoint)


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """Return the folder of the checkpoint of an iteration, as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


@contextmanager
def showing_only(checkpoint: Path | None, args: Namespace) -> Iterator[None]:
    """Let `--load` be a folder with one checkpoint, or without any, while Megatron loads during the block.

    Megatron prefers other checkpoints to `--ckpt-step`: the imported model that a tracker file names, and the newest
    non-persistent checkpoint, sound or not. Megatron fails if the tracker file is unusable. Hide `--no-save-optim` and
    `--no-save-rng`, too: Megatron would not ask the checkpoint for these states, and then fail or exit with code 0.
    """
    hidden = dict.fromkeys(("load", "non_persistent_ckpt_type", "no_save_optim", "no_save_rng"))
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
    """Return the iterations of all checkpoints in a folder, sound or damaged, in descending order."""
    iterations = (iteration_of(path) for path in Path(folder).glob("iter_*") if path.is_dir())
    return sorted((iteration for iteration in iterations if iteration is not None), reverse=True)


def is_finished(checkpoint: Path) -> bool:
    """Return whether the save of a checkpoint was finished: Megatron writes `COMPLETION_FILE` last."""
    return (checkpoint / COMPLETION_FILE).exists()


def has_checkpoint(folder: str | Path) -> bool:
    """Return whether a run has saved a checkpoint in a folder, or has begun to."""
    return (Path(folder) / TRACKER).is_file() or bool(saved_iterations(folder))


def describe_missing(folder: str | Path) -> str:
    """Return the error about a folder without checkpoints, and what the folder holds instead."""
    if has_checkpoint(Path(folder) / "checkpoints"):
        return f"{folder} holds no checkpoint, but {Path(folder) / 'checkpoints'} does"
    if (Path(folder) / "config.json").is_file():
        return f"{folder} holds an exported model, of which `maskmoe convert hf-to-megatron` makes a checkpoint"
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


def choose_checkpoint(
    folder: str | Path,
    step: int | None = None,
    check: Callable[[Path], None] = check_structure,
    non_persistent: Path | None = None,
) -> Choice:
    """Choose the newest sound checkpoint in a folder, or in the folder of the run's non-persistent checkpoints.

    The search starts with the checkpoint that the tracker file names, or without a usable tracker file with the newest
    one, and continues with older checkpoints. A folder in which only the first save was interrupted counts as empty. Of
    two checkpoints of one iteration, the persistent one is chosen.

    Args:
        folder: The folder in Megatron's `--load`.
        step: Megatron's `--ckpt-step`, the only iteration to choose; None to choose among all.
        check: Raises `Damage` if a checkpoint is not sound.
        non_persistent: The folder of the non-persistent checkpoints, which need no tracker file; None without them.

    Raises:
        UserError: The folder has checkpoints, or a record of one, but none is sound. Or this user may not read one that
            is newer than all sound ones.
    """
    rejected: list[Damage] = []
    candidates = [checkpoint_path(folder, step)] if step is not None else _candidates(folder)
    if non_persistent is not None:
        iterations = (saved for saved in saved_iterations(non_persistent) if step in (None, saved))
        candidates += [checkpoint_path(non_persistent, iteration) for iteration in iterations]
        # The order is stable: a persistent checkpoint stays before a non-persistent one of the same iteration.
        candidates.sort(key=_iteration_or_release, reverse=True)
    for candidate in candidates:
        try:
            check(candidate)
            return Choice(candidate, tuple(rejected))
        except Unreadable:
            raise
        except Damage as damage:
            rejected.append(damage)
    # Without a tracker file, no save was finished.
    is_without_saves = step is None and not (Path(folder) / TRACKER).exists()
    if is_without_saves and all(isinstance(damage, Unfinished) for damage in rejected):
        return Choice(None, tuple(rejected))
    reasons = "; ".join(map(str, rejected)) or f"{TRACKER} names none that exists"
    raise UserError(f"{folder} holds no sound checkpoint: {reasons}")


def locate_checkpoint(path: Path, step: int | None = None) -> Path:
    """Return the folder of a checkpoint: `path` itself, or in a run's folder that of iteration `step`, else the newest.

    An older checkpoint never takes the place of a damaged one: the caller would not notice.

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


def finished_iterations(folder: str | Path) -> list[int]:
    """Return the checkpoints' iterations up to the one in the tracker file, or all without a usable one, descending."""
    tracked = read_tracker(folder)
    return [step for step in saved_iterations(folder) if not isinstance(tracked, int) or step <= tracked]


def _candidates(folder: str | Path) -> list[Path]:
    """Return the checkpoints that a run may load, best first; a missing one that the tracker file names is included."""
    tracked = read_tracker(folder)
    if tracked == RELEASE:
        return [Path(folder) / RELEASE]
    iterations = finished_iterations(folder)
    if isinstance(tracked, int) and tracked not in iterations:
        iterations.insert(0, tracked)
    return [checkpoint_path(folder, iteration) for iteration in iterations]


def _iteration_or_release(checkpoint: Path) -> int:
    """Return the iteration of a checkpoint; a `release` checkpoint is older than all iterations."""
    iteration = iteration_of(checkpoint)
    return -1 if iteration is None else iteration


def newest_sound(folder: str | Path) -> int | None:
    """Return the newest iteration whose checkpoint passes `check_structure`; None if there is none."""
    for iteration in saved_iterations(folder):
        with suppress(Damage):
            check_structure(checkpoint_path(folder, iteration))
            return iteration
    return None


def remove_unfinished_checkpoints(folder: str | Path) -> None:
    """Remove what failed saves left: unfinished checkpoints that are newer than the tracker file says."""
    newest = read_tracker(folder)
    for iteration in saved_iterations(folder):
        checkpoint = checkpoint_path(folder, iteration)
        is_newer = not isinstance(newest, int) or iteration > newest
        if is_newer and not is_finished(checkpoint):
            shutil.rmtree(checkpoint, ignore_errors=True)


def remove_old_checkpoints(
    folder: str | Path,
    keep: int | None,
    retain_interval: int | None = None,
    newest: int | None = None,
    is_dry_run: bool = False,
    check: Callable[[Path], None] = check_structure,
) -> list[Path]:
    """Remove all checkpoints that are older than the newest `keep` sound checkpoints, and return their folders.

    Args:
        folder: The folder in Megatron's `--save`.
        keep: The number of sound checkpoints that stay; None keeps all.
        retain_interval: Megatron's `--save-retain-interval`; checkpoints at multiples of this iteration stay, too.
        newest: The newest iteration of the run. Later checkpoints were rejected on loading, or the run has gone back
            beyond them, so they neither count nor are removed. None counts all checkpoints.
        is_dry_run: Whether to remove nothing.
        check: Raises `Damage` if a checkpoint is not sound.
    """
    iterations = [saved for saved in saved_iterations(folder) if newest is None or saved <= newest]
    # The check of a checkpoint opens thousands of files, while all ranks wait.
    if keep is None or len(iterations) <= keep:
        return []
    kept, old = [], []
    for iteration in iterations:
        checkpoint = checkpoint_path(folder, iteration)
        if len(kept) < keep:
            with suppress(Damage):
                check(checkpoint)
                kept.append(checkpoint)
        elif not (retain_interval and iteration % retain_interval == 0) and not checkpoint.is_symlink():
            old.append(checkpoint)
    if old and not is_dry_run:
        # The writer has synchronized the tensors, but not the small files. A loss of power could otherwise leave them
        # empty, and the old checkpoints removed. Before 2.14, torch synchronized .metadata while it was empty.
        small_files = [path for checkpoint in kept for path in (*checkpoint.glob("*.json"), checkpoint / ".metadata")]
        for path in (*small_files, *kept, Path(folder)):
            with suppress(OSError):  # some network file systems cannot synchronize folders
                sync_to_disk(path)
        for checkpoint in old:
            shutil.rmtree(checkpoint, ignore_errors=True)
    return old


_SUBFOLDER = "non_persistent"  # Megatron's name


def non_persistent_folder(args: Namespace, folder: str | Path | None) -> Path | None:
    """Return the folder of the non-persistent checkpoints beside `--save` or `--load`; None if the run has none."""
    if args.non_persistent_ckpt_type != "global" or folder is None:
        return None
    return Path(args.non_persistent_global_ckpt_dir or Path(folder) / _SUBFOLDER)


def check_separate_folder(args: Namespace) -> None:
    """Raise `UserError` if the folder of non-persistent checkpoints is or contains the folder of other checkpoints."""
    if args.non_persistent_global_ckpt_dir is None:
        return
    folder = Path(args.non_persistent_global_ckpt_dir).resolve()
    for flag, other in (("--save", args.save), ("--load", args.load)):
        if other is not None and Path(other).resolve().is_relative_to(folder):
            raise UserError(
                f"--non-persistent-global-ckpt-dir {args.non_persistent_global_ckpt_dir} holds the folder of {flag} "
                f"{other}, whose checkpoints must stay: pass a folder of its own"
            )


def newest_saved(args: Namespace) -> tuple[Path, int | str] | None:
    """Return folder and iteration of the newest checkpoint that a run has saved, persistent or not; None if none."""
    if not args.save:
        return None
    newest, local = read_tracker(args.save), non_persistent_folder(args, args.save)
    newest_local = newest_sound(local) if local is not None else None
    if local is not None and newest_local is not None and not (isinstance(newest, int) and newest >= newest_local):
        return local, newest_local
    return None if newest is None else (Path(args.save), newest)


def make_room(folder: Path, iteration: int, loaded: int | None = None) -> None:
    """Remove the non-persistent checkpoints that a save makes useless; the newest sound checkpoint stays.

    A checkpoint of `iteration` or later is left of an unfinished save, or of a run that went back to an earlier
    iteration. Megatron would keep it as the newest one, and remove the sound one. In the first save of a run,
    checkpoints later than `loaded`, the iteration from which the run has resumed, are useless, too.
    """
    for saved in saved_iterations(folder):
        checkpoint = checkpoint_path(folder, saved)
        if (saved >= iteration or (loaded is not None and saved > loaded)) and not checkpoint.is_symlink():
            shutil.rmtree(checkpoint, ignore_errors=True)
    remove_old_checkpoints(folder, keep=1)
