"""One quickstart at a time in a run folder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskmoe.errors import UserError

_PATIENCE_SECONDS = 60.0


@contextmanager
def locked(path: Path, patience: float = _PATIENCE_SECONDS) -> Iterator[int]:
    """Hold the lock file for the time of the block; yields its descriptor.

    Processes that inherit the descriptor hold the lock as well. So it is free only when all processes of a quickstart
    that was killed have ended, which may take some seconds: they are waited for.

    Args:
        path: of the file, which is made.
        patience: seconds to wait for what a quickstart that is gone has left.

    Raises:
        UserError: another quickstart is at work here.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(descriptor, path, patience)
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _read_owner(descriptor)
        if owner is None or _is_alive(owner):
            at_work = f"process {owner}" if owner else "just started"
            raise UserError(f"another quickstart ({at_work}) is at work in {path.parent}; give another --run-dir")
        if time.monotonic() > deadline:
            raise UserError(
                f"processes of an earlier quickstart (process {owner}, which is gone) still work in {path.parent}: "
                "end them, or give another --run-dir"
            )
        time.sleep(0.2)


def _read_owner(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else None


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
