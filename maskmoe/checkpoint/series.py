"""The checkpoints of one run, in Megatron's folder `--save`, and which of them to go on from."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from maskmoe.checkpoint.integrity import Damage, Unfinished, check_structure
from maskmoe.cli import atomic_output
from maskmoe.errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""The name of a checkpoint that no training run saved, for example a converted one."""


@dataclass(frozen=True)
class Choice:
    """Which checkpoint to load.

    Attributes:
        checkpoint: its folder; None if there is none.
        rejected: the newer ones that are damaged, with what is wrong with each.
    """

    checkpoint: Path | None
    rejected: tuple[tuple[Path, str], ...] = ()

    @property
    def iteration(self) -> int | None:
        """Its iteration; None for a `release` checkpoint or none."""
        return self.checkpoint and iteration_of(self.checkpoint)


def checkpoint_path(folder: str | Path, iteration: int) -> Path:
    """The folder of one checkpoint under `--save`, as Megatron names it."""
    return Path(folder) / f"iter_{iteration:07d}"


def iteration_of(checkpoint: Path) -> int | None:
    """The iteration in the name of a checkpoint's folder; None for a `release` checkpoint, or if it is no such name."""
    number = checkpoint.name.removeprefix("iter_")
    return int(number) if number.isdecimal() else None


def saved_iterations(folder: str | Path) -> list[int]:
    """The iterations of all checkpoints under `folder`, whole or not, newest first."""
    iterations = (iteration_of(path) for path in Path(folder).glob("iter_*") if path.is_dir())
    return sorted((iteration for iteration in iterations if iteration is not None), reverse=True)


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run has saved, or begun to save, a checkpoint under `folder`."""
    return (Path(folder) / TRACKER).is_file() or bool(saved_iterations(folder))


def write_tracker(folder: str | Path, iteration: int | str) -> None:
    """Record which checkpoint is the newest, or that it is `RELEASE`; Megatron itself writes the file in place."""
    with atomic_output(Path(folder) / TRACKER) as path:
        path.write_text(str(iteration))


def read_tracker(folder: str | Path) -> int | str | None:
    """The iteration in Megatron's tracker file, or "release"; None if the file is missing or makes no sense."""
    try:
        text = (Path(folder) / TRACKER).read_text(errors="replace").strip()
    except OSError:
        return None
    if text == RELEASE:
        return text
    return int(text) if text.isascii() and text.isdecimal() else None


def choose_checkpoint(
    folder: str | Path, step: int | None = None, check: Callable[[Path], None] = check_structure
) -> Choice:
    """The newest sound checkpoint under `folder`, from the one that the tracker names downwards.

    Without a usable tracker, which an interrupted save may leave behind, from the newest downwards. If nothing but the
    rests of interrupted first saves is there, there is none.

    Args:
        folder: Megatron's `--load`.
        step: Megatron's `--ckpt-step`: this one and no other.
        check: raises `Damage` if a checkpoint is not sound.

    Raises:
        UserError: there are checkpoints, or a record of one, but none is sound.
    """
    if step is None and not has_checkpoint(folder):
        return Choice(None)
    tracked = read_tracker(folder)
    if step is not None:
        candidates = [checkpoint_path(folder, step)]
    elif tracked == RELEASE:
        candidates = [Path(folder) / RELEASE]
    else:
        iterations = [i for i in saved_iterations(folder) if tracked is None or i <= tracked]
        if tracked is not None and tracked not in iterations:
            iterations.insert(0, tracked)
        candidates = [checkpoint_path(folder, iteration) for iteration in iterations]
    rejected = []
    is_first_save = step is None and not (Path(folder) / TRACKER).exists()
    for candidate in candidates:
        try:
            check(candidate)
        except Damage as damage:
            rejected.append((candidate, str(damage)))
            is_first_save = is_first_save and isinstance(damage, Unfinished)
        else:
            return Choice(candidate, tuple(rejected))
    if is_first_save:
        return Choice(None, tuple(rejected))
    reasons = "; ".join(f"{path} {reason}" for path, reason in rejected) or f"{TRACKER} names none that exists"
    raise UserError(f"--load {folder} holds no sound checkpoint: {reasons}")


def remove_old_checkpoints(folder: str | Path, keep: int | None, retain_interval: int | None = None) -> list[Path]:
    """Remove all but the newest `keep` whole checkpoints, and older unfinished ones; returns which.

    Args:
        folder: Megatron's `--save`.
        keep: None keeps all.
        retain_interval: Megatron's `--save-retain-interval`, whose multiples stay, too.
    """
    if keep is None:
        return []
    kept, removed = 0, []
    for iteration in saved_iterations(folder):
        checkpoint = checkpoint_path(folder, iteration)
        if kept >= keep and not (retain_interval and iteration % retain_interval == 0) and not checkpoint.is_symlink():
            shutil.rmtree(checkpoint, ignore_errors=True)
            removed.append(checkpoint)
            continue
        try:
            check_structure(checkpoint)
            kept += 1
        except Damage:
            continue
    return removed
