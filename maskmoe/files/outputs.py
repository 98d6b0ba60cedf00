"""Writes files whole: no incomplete file is left behind, and no checkpoint of Megatron is changed."""

import os
import signal
import stat
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import FrameType

from maskmoe.errors import UserError, refused_by_system
from maskmoe.processes.interruption import handling_signals

CURE = "choose an existing, writable folder"
_NAME_CHARACTERS = 40  # of an output's name in the name of its temporary file, since file systems limit names


def check_output_kind(path: Path) -> None:
    """Check that a path is free, or leads to a regular file, which can be replaced. Raises UserError."""
    with refused_by_system(f"cannot write {path}", CURE), suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"cannot write {path}: it is {kind}; name a file")


def refuse_checkpoint(path: Path) -> None:
    """Refuse an output in the folder of a checkpoint of Megatron, which must stay as it was saved. Raises UserError."""
    path = Path(os.path.realpath(path))
    for folder in (path, *path.parents):
        if os.path.isfile(folder / ".metadata"):  # Eclipse has a folder of this name
            raise UserError(
                f"cannot write {path}: {folder} is a checkpoint, which stays as it was saved; write elsewhere"
            )


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Readers see the old file or the complete new file. The file has the permissions that the umask gives to new files.
    SIGTERM and SIGHUP count as failures, see `unwinding_on_signals`.

    Raises:
        UserError: `path` is a folder or a device, or the folder of `path` does not exist or is not writable.
    """
    path = Path(path)
    check_output_kind(path)
    temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{uuid.uuid4().hex[:8]}.tmp")
    with unwinding_on_signals():
        with refused_by_system(f"cannot write {path}", CURE):
            temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors replaces the file by a file that only its owner may read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, which replaces an older file atomically. Raises UserError, see `atomic_output`."""
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwinding_on_signals() -> AbstractContextManager[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit(128 + number)` in the block, so that its context managers clean up.

    Signals that are ignored or have a handler keep their handling. Outside the main thread nothing changes, because
    Python handles signals on the main thread only.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    return handling_signals([each for each in numbers if signal.getsignal(each) is signal.SIG_DFL], _exit_once)


def _exit_once(number: int, _frame: FrameType | None) -> None:
    """Raise `SystemExit`, and ignore further signals, which would interrupt the context managers that clean up."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(other) is _exit_once:
            signal.signal(other, _ignore)
    raise SystemExit(128 + number)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Unlike `signal.SIG_IGN`, this handler is not inherited by processes that the cleaning up starts."""
