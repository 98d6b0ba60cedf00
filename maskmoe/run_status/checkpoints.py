"""Reads the checkpoints of a run, and whether they are sound."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from maskmoe.checkpoint.integrity import (
    COMPLETION_FILE,
    MANIFEST_FILE,
    Damage,
    Unfinished,
    check_content,
    check_structure,
    iteration_of,
)
from maskmoe.checkpoint.series import (
    RELEASE,
    checkpoint_path,
    choose_checkpoint,
    has_checkpoint,
    saved_iterations,
)
from maskmoe.errors import UserError, one_line
from maskmoe.files.run_folder import CHECKPOINTS
from maskmoe.processes.folder_lock import LOCK_NAME

Soundness = Literal["complete", "verified", "unfinished", "damaged"]
"""The state of a checkpoint, as far as it is known.

All files of a complete checkpoint have their full size, and those of a verified one also have the content that was
saved. An unfinished checkpoint is being saved, or its saving was interrupted. A damaged checkpoint lacks a file, or has
one that is not as it was saved.
"""


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint.

    Attributes:
        path: Its folder.
        iteration: Its iteration; None for a `release` checkpoint.
        size: The size of its files in bytes.
        saved: When it was completed, or last changed, in seconds since 1970.
        soundness: The state of its files.
        fault: What is wrong, a clause; empty if nothing is.
    """

    path: Path
    iteration: int | None
    size: int
    saved: float
    soundness: Soundness
    fault: str = ""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run.

    Attributes:
        folder: The folder of the checkpoints; None if the run has none.
        saved: The checkpoints, the newest first.
        next_start: The checkpoint that a restart would load; None without a sound checkpoint, or with `load`.
        problem: Why a restart would be refused; empty if it would not.
        load: The run's `--load` if it is another folder than `--save`: every start loads from there; else empty.
    """

    folder: Path | None = None
    saved: tuple[SavedCheckpoint, ...] = ()
    next_start: Path | None = None
    problem: str = ""
    load: str = ""


def find_checkpoints(run: Path, save: Path | None) -> Path | None:
    """Return the folder of a run's checkpoints and of its lock; None if there is none.

    Args:
        run: The run folder.
        save: The folder in the run's `--save`.
    """
    places = (place for place in (run / CHECKPOINTS, run, save) if place is not None)
    return next((place for place in places if has_checkpoint(place) or (place / LOCK_NAME).exists()), None)


def read_checkpoints(folder: Path | None, frequent: Path | None, verify: bool, load: str = "") -> Checkpoints:
    """Return the checkpoints in a folder. Checkpoints that are removed meanwhile are left out.

    Args:
        folder: The folder of the checkpoints; None if the run has none.
        frequent: The folder of the non-persistent checkpoints; None if the run saves none.
        verify: Whether to compare all files with their digests, which reads all of their bytes.
        load: See `Checkpoints`.
    """
    if folder is None:
        return Checkpoints()
    paths = [checkpoint_path(place, step) for place in (folder, frequent) if place for step in saved_iterations(place)]
    paths += [folder / RELEASE] if (folder / RELEASE).is_dir() else []
    shown = tqdm(paths, "verifying", disable=not verify, leave=False)
    damages = {path: _find_damage(path, verify) for path in shown}
    saved: dict[Path, SavedCheckpoint] = {}
    for path, damage in damages.items():
        with suppress(OSError):  # the checkpoint was removed meanwhile
            saved[path] = _describe(path, damage, verify)

    def check(checkpoint: Path) -> None:
        """Raise the damage of a checkpoint."""
        if checkpoint not in saved:
            raise Damage(checkpoint, "does not exist")
        if (damage := damages[checkpoint]) is not None:
            raise damage

    newest_first = sorted(saved.values(), key=lambda each: -1 if each.iteration is None else each.iteration)[::-1]
    if load:
        return Checkpoints(folder, tuple(newest_first), load=load)
    try:
        next_start = choose_checkpoint(folder, None, check, frequent).checkpoint
        return Checkpoints(folder, tuple(newest_first), next_start)
    except UserError as error:
        return Checkpoints(folder, tuple(newest_first), None, one_line(error))


def _find_damage(path: Path, verify: bool) -> Damage | None:
    """Return the first fault of a checkpoint, see `read_checkpoints`; None if it has none."""
    try:
        check_structure(path)
        if verify:
            check_content(path)
    except Damage as damage:
        return damage
    return None


def _describe(path: Path, damage: Damage | None, verify: bool) -> SavedCheckpoint:
    """Return a description of a checkpoint. Raises OSError if the checkpoint is gone."""
    soundness: Soundness = "verified" if verify and (path / MANIFEST_FILE).exists() else "complete"
    if damage is not None:
        soundness = "unfinished" if isinstance(damage, Unfinished) else "damaged"
    completed = path / COMPLETION_FILE
    return SavedCheckpoint(
        path=path,
        iteration=iteration_of(path),
        size=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
        saved=(completed if completed.exists() else path).stat().st_mtime,
        soundness=soundness,
        fault="" if damage is None else one_line(damage.fault),
    )
