"""Makes the folder of a conversion's result, which appears under its name only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from maskmoe.errors import UserError
from maskmoe.files.outputs import unwinding_on_signals

UNFINISHED = ".unfinished"
"""Suffix of the name of a folder that a conversion is filling."""


def check_output_folder(folder: Path) -> None:
    """Check that a conversion can write a folder.

    Raises:
        UserError: the folder has content, or another conversion is writing it.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    unfinished = _unfinished(folder)
    if os.path.lexists(unfinished):
        raise UserError(
            f"{unfinished} exists: a conversion is writing it, or was killed; remove it if no conversion is running"
        )


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; give it the name `folder` on success, remove it on failure.

    All files are on the disk before the folder gets its name. SIGTERM and SIGHUP count as failures.

    Raises:
        UserError: see `check_output_folder`; or the disk is full, or a file cannot be written.
    """
    check_output_folder(folder)
    unfinished = _unfinished(folder)
    try:
        with unwinding_on_signals():
            unfinished.mkdir(parents=True)
            try:
                yield unfinished
                for path in (unfinished, *unfinished.rglob("*")):
                    _sync(path)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"cannot write {folder}: {error}") from error


def _unfinished(folder: Path) -> Path:
    """Return the temporary folder that becomes `folder`."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(folder.name + UNFINISHED)


def _sync(path: Path) -> None:
    """Wait until the content of a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
