"""Reads the checkpoints of a run, and whether they are sound."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from maskmoe.checkpoint.integrity import (
    COMPLETION_FILE,
    Damage,
    Manifest,
    Unfinished,
    check_by_manifest,
    check_content,
)
from maskmoe.checkpoint.non_persistent import non_persistent_folder
from maskmoe.checkpoint.series import (
    RELEASE,
    checkpoint_path,
    choose_checkpoint,
    has_checkpoint,
    iteration_of,
    saved_iterations,
)
from maskmoe.command_line.parser import one_line
from maskmoe.errors import UserError
from maskmoe.launch.run_folder import CHECKPOINTS
from maskmoe.processes.folder_lock import LOCK_NAME


class Soundness(StrEnum):
    """The state of a checkpoint, as far as it is known.

    Attributes:
        COMPLETE: all files have their full size; their content was not compared.
        VERIFIED: all files have the content that was saved.
        UNFINISHED: the checkpoint is being saved, or its saving was interrupted.
        DAMAGED: a file is missing, has another size or another content.
    """

    COMPLETE = "complete"
    VERIFIED = "verified"
    UNFINISHED = "unfinished"
    DAMAGED = "damaged"


_SOUNDNESS_OF: Mapping[type[Damage], Soundness] = {
    Unfinished: Soundness.UNFINISHED,
}


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint.

    Attributes:
        path: its folder.
        iteration: its iteration; None for a `release` checkpoint.
        size: the size of its files in bytes.
        saved: when it was completed, or last changed, in seconds since 1970.
        soundness: the state of its files.
        fault: what is wrong, a clause; empty if nothing is.
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
        folder: the folder of the checkpoints; None if the run has none.
        saved: the checkpoints, the newest first.
        next_start: the checkpoint that a restart would load; None without a sound checkpoint.
        problem: why a restart would be refused; empty if it would not.
    """

    folder: Path | None = None
    saved: tuple[SavedCheckpoint, ...] = ()
    next_start: Path | None = None
    problem: str = ""


def find_checkpoints(run: Path, texts: Mapping[str, str]) -> Path | None:
    """Return the folder of a run's checkpoints and of its lock; None if there is none.

    Args:
        run: the run folder.
        texts: the arguments that the run has logged.
    """
    save = Path(texts.get("save", ""))
    places = [run / CHECKPOINTS, run, *([save] if save.is_absolute() else [])]
    with suppress(OSError, ValueError):
        return next((place for place in places if has_checkpoint(place) or (place / LOCK_NAME).exists()), None)
    return None


@dataclass
class CheckpointReader:
    """Reads the checkpoints of a run again and again.

    Attributes:
        on_slow: called with a few words before something that takes seconds.
        verification: takes the path of a checkpoint and the size of its files, and returns a context in which the
            checkpoint is verified, with a function that is called with the size of each verified file. None does not
            verify.
    """

    on_slow: Callable[[str], None]
    verification: Callable[[Path, int], AbstractContextManager[Callable[[int], object]]] | None = None
    _verified: dict[tuple[Path, float], Damage | None] = field(default_factory=dict)

    def read(self, folder: Path | None, texts: Mapping[str, str]) -> Checkpoints:
        """Return the checkpoints in a folder. Checkpoints that are removed meanwhile are left out.

        Args:
            folder: the folder of the checkpoints.
            texts: the arguments that the run has logged.
        """
        if folder is None:
            return Checkpoints()
        frequent = non_persistent_folder(_non_persistent_settings(texts), folder)
        paths = [checkpoint_path(place, step) for place in (folder, frequent) if place for step in _iterations(place)]
        if (folder / RELEASE).is_dir():
            paths.append(folder / RELEASE)
        damages: dict[Path, Damage] = {}
        saved = [each for path in paths if (each := self._read(path, damages)) is not None]
        saved.sort(key=lambda each: (each.iteration is not None, each.iteration or 0), reverse=True)
        next_start, problem = _next_start(folder, frequent, saved, damages)
        return Checkpoints(folder, tuple(saved), next_start, problem)

    def _read(self, path: Path, damages: dict[Path, Damage]) -> SavedCheckpoint | None:
        """Return a checkpoint, and note its damage; None if the checkpoint is gone."""
        soundness, fault = Soundness.COMPLETE, ""
        size = _size(path)
        try:
            manifest = Manifest.load(path)
            is_finished = (path / COMPLETION_FILE).exists()
            if is_finished and not manifest.has_sizes and "torch" not in sys.modules:
                self.on_slow(f"{path.name} has no digests, so its layout is read")
            check_by_manifest(path)
            if self.verification is not None and manifest.files:
                self._verify(path, size)
                soundness = Soundness.VERIFIED
        except Damage as damage:
            damages[path] = damage
            soundness = _SOUNDNESS_OF.get(type(damage), Soundness.DAMAGED)
            fault = one_line(damage.fault)
        try:
            completed = path / COMPLETION_FILE
            saved = (completed if completed.is_file() else path).stat().st_mtime
        except OSError:
            return None
        return SavedCheckpoint(path, iteration_of(path), size, saved, soundness, fault)

    def _verify(self, path: Path, size: int) -> None:
        """Compare a checkpoint with its digests, once. Raises Damage."""
        assert self.verification is not None
        try:
            key = path, (path / COMPLETION_FILE).stat().st_mtime
        except OSError as error:
            raise Damage(path, f"has no {COMPLETION_FILE} any more") from error
        if key not in self._verified:
            self._verified[key] = None
            try:
                with self.verification(path, size) as on_checked:
                    check_content(path, on_checked=on_checked)
            except Damage as damage:
                self._verified[key] = damage
        if (damage := self._verified[key]) is not None:
            raise damage


def _next_start(
    folder: Path, frequent: Path | None, saved: list[SavedCheckpoint], damages: Mapping[Path, Damage]
) -> tuple[Path | None, str]:
    """Return the checkpoint that a restart would load, and why it would be refused."""

    def check(checkpoint: Path) -> None:
        """Raise the damage of a checkpoint."""
        if checkpoint in damages:
            raise damages[checkpoint]
        if not any(each.path == checkpoint for each in saved):
            raise Damage(checkpoint, "does not exist")

    # The name of the folder comes from the run's log, so look there only if a checkpoint was found in it.
    has_frequent = any(each.path.parent == frequent for each in saved)
    try:
        return choose_checkpoint(folder, None, check, frequent if has_frequent else None).checkpoint, ""
    except UserError as error:
        return None, one_line(error)


def _non_persistent_settings(texts: Mapping[str, str]) -> Namespace:
    """Return Megatron's arguments of non-persistent checkpoints, which a run logs as text."""
    names = ("non_persistent_ckpt_type", "non_persistent_global_ckpt_dir")
    return Namespace(**{name: None if (text := texts.get(name, "None")) == "None" else text for name in names})


def _iterations(folder: Path) -> list[int]:
    """Return the iterations of the checkpoints in a folder, which may be gone."""
    with suppress(OSError, ValueError):
        return saved_iterations(folder)
    return []


def _size(folder: Path) -> int:
    """Return the size of the files in a folder in bytes; files that are removed meanwhile do not count."""
    size = 0
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    size += entry.stat(follow_symlinks=False).st_size
    return size
