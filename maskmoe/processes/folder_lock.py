"""Lets only one process at a time write to a place: a run to its folder, or a command to its output.

The holder has a POSIX lock on a file, which child processes do not inherit and the kernel frees when the holder ends.
"""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskmoe.errors import UserError, one_line, refused_by_system

LOCK_NAME = ".run.lock"  # the lock file in a locked folder
_IS_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without locks


@contextmanager
def locked_folder(folder: Path, flag: str = "--save") -> Iterator[None]:
    """Hold the lock of a folder, which the flag names; a missing folder is made, and removed if it stays empty.

    Raises:
        UserError: Another process holds the lock, or the folder cannot be locked.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    with refused_by_system(f"cannot lock {folder}", f"choose another {flag}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / LOCK_NAME, folder, flag):
            yield
    finally:
        for path in made:
            with suppress(OSError):  # the folder is not empty
                path.rmdir()


@contextmanager
def locked(path: Path, target: Path, flag: str) -> Iterator[None]:
    """Hold the lock of `target`, which the flag names: of the file `path`, which exists as long as it is locked.

    Raises:
        UserError: Another process holds the lock, or the file cannot be made or locked.
    """
    with refused_by_system(f"cannot lock {target}", f"choose another {flag}"):
        lock = _acquire(path, f"writing to {target}; wait until it ends, stop it, or choose another {flag}")
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(lock)  # frees the lock


def check_unlocked(folder: Path) -> None:
    """Raise `UserError` if another process holds the lock of a folder."""
    path = folder / LOCK_NAME
    with suppress(OSError):
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            if not _try_lock(lock, path):
                raise _refusal(lock, f"writing to {folder}; wait until it ends, stop it, or choose another folder")
        finally:
            os.close(lock)


def _acquire(path: Path, what: str) -> int:
    """Make and lock the file, write this process into it, and return its descriptor."""
    while True:
        # Do not follow a link: the folder may come from a stranger, and the file is written.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_lock(lock, path):
                raise _refusal(lock, what)
            # The holder that just ended may have removed this file, and a third process may have made another.
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"process {os.getpid()} on host {socket.gethostname()}".encode(), 0)
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _try_lock(lock: int, path: Path) -> bool:
    """Lock an open file without waiting; return whether this process has the lock now."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        note = f"note: the file system of {path.parent} has no locks: make sure that no other process writes there"
        print(note, file=sys.stderr, flush=True)
    return True


def _refusal(lock: int, what: str) -> UserError:
    holder = os.pread(lock, 300, 0).decode(errors="replace")
    return UserError(f"another process ({one_line(holder) or 'which has just started'}) is {what}")
