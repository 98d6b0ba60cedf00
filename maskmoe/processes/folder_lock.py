"""Lets only one run or conversion at a time write to a folder, also across the nodes of a shared file system.

The holder has a POSIX lock on a file in the folder. The kernel frees the lock when the holder ends, however it ends,
and child processes do not inherit the lock. Network file systems with a lock service show the lock to all nodes. For
file systems without one, the holder also touches the file every few seconds, and a lock of another host counts as free
once the file has not been touched for a while. The clocks of the hosts need not agree.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from maskmoe.errors import UserError, one_line, refused_by_system
from maskmoe.files.untrusted import UnusableFile, open_regular
from maskmoe.processes.lifetimes import Holder, beating

LOCK_NAME = ".run.lock"
"""Name of the lock file in a locked folder."""

_TOUCH_SECONDS = 10.0
_STALE_SECONDS = 35.0  # three touches and some time for the caches of a network file system
_END_SECONDS = 20.0  # which the processes of a run that has just ended may take
_POLL_SECONDS = 0.5
_MAX_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without locks
_IS_HELD = (errno.EACCES, errno.EAGAIN)
_HOLDER = TypeAdapter(Holder)
_FLOCK = "hhqqi0q"  # the struct flock of Linux: type, whence, start, length, process


@dataclass(frozen=True)
class LockState:
    """The state of a folder's lock, as a process sees the lock without locking anything.

    Attributes:
        holder: The process that the lock file names; None if the file names none.
        is_held: Whether a process of any host holds the lock; None if the file system does not show locks.
        touched: When the lock file was last touched, in seconds since 1970 on the clock of the file's server.
    """

    holder: Holder | None
    is_held: bool | None
    touched: float

    @property
    def is_alive(self) -> bool:
        """Whether the holder seems to run: it holds the lock, or it touched the file a short time ago."""
        if self.is_held or self.holder is None:
            return bool(self.is_held)
        if self.holder.is_here:
            return self.is_held is None and self.holder.is_alive
        # The file system may not show the locks of other hosts.
        return time.time() - self.touched < _STALE_SECONDS


def look_at_lock(folder: Path) -> LockState | None:
    """Return the state of a folder's lock; None without a lock file. Nothing is locked or written.

    A process must not look at a lock that it holds itself: closing the file would free the lock.
    """
    try:
        with open_regular(folder / LOCK_NAME) as stream:
            return LockState(_read(stream.fileno()), _is_locked(stream.fileno()), os.fstat(stream.fileno()).st_mtime)
    except (UnusableFile, OSError):
        return None


@contextmanager
def locked_folder(folder: Path, flag: str = "--save") -> Iterator[None]:
    """Hold the lock of a folder, which is made if missing.

    Args:
        folder: The folder.
        flag: The flag that names the folder, for the error.

    Raises:
        UserError: The lock is held or cannot be made.
    """
    path = folder / LOCK_NAME
    with refused_by_system(f"cannot lock {folder}", f"choose another {flag}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    try:
        with beating(partial(os.utime, lock), _TOUCH_SECONDS):
            yield
    finally:
        with suppress(OSError):
            path.unlink()
        os.close(lock)  # frees the lock


def check_unlocked(folder: Path, patience: float = 0.0) -> None:
    """Raise `UserError` if a process that this host can see holds a folder's lock for more than `patience` seconds."""
    deadline = time.monotonic() + patience
    while (state := look_at_lock(folder)) is not None and state.is_held and state.holder is not None:
        if time.monotonic() >= deadline:
            raise _refusal(folder, state.holder)
        time.sleep(_POLL_SECONDS)


def _acquire(path: Path) -> int:
    """Lock the file, write this process into it and return its descriptor; raise `UserError` if the lock is held."""
    me = Holder.this_process()
    start, gone = time.monotonic(), None
    while True:
        # Do not follow a link: the folder may come from a stranger, and the file is written.
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        is_locked, holder = _try_lock(lock), _read(lock)
        is_left = holder in (None, gone, me)
        if is_locked is not False and is_left and _is_file_of(path, lock):
            os.ftruncate(lock, 0)
            os.pwrite(lock, _HOLDER.dump_json(me), 0)
            return lock
        os.close(lock)
        if is_locked is False:
            # The file does not name its holder yet, or names a holder that is ending.
            is_changing = holder is None or holder.has_ended
            if not is_changing or time.monotonic() - start > _END_SECONDS:
                raise _refusal(path.parent, holder)
            time.sleep(_POLL_SECONDS)
        elif holder is not None and not is_left:
            if _is_held_elsewhere(path, holder, is_locked):
                raise _refusal(path.parent, holder)
            gone = holder


def _try_lock(lock: int) -> bool | None:
    """Lock an open file without waiting; return whether this process has the lock, None if there are no locks."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_HELD:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_locked(lock: int) -> bool | None:
    """Return whether another process has locked an open file; None if there are no locks."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(lock, fcntl.F_GETLK, question)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK


def _is_file_of(path: Path, lock: int) -> bool:
    """Return whether an open file is still the file at a path: a holder that ends removes its file."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except OSError:
        return False


def _is_held_elsewhere(path: Path, holder: Holder, is_locked: bool | None) -> bool:
    """Return whether the process in the lock file still runs, although the file system shows no lock of it."""
    if holder.is_here:
        return is_locked is None and holder.is_alive
    # Wait for a touch. Opening the file asks the server of a network file system again.
    start, first = time.monotonic(), look_at_lock(path.parent)
    while time.monotonic() - start < _STALE_SECONDS:
        time.sleep(_POLL_SECONDS)
        state = look_at_lock(path.parent)
        if state is None:
            return False
        if first is None or state.touched != first.touched:
            return True
    return False


def _read(lock: int) -> Holder | None:
    """Return the process that a lock file names, or None."""
    try:
        return _HOLDER.validate_json(os.pread(lock, _MAX_BYTES, 0))
    except (OSError, ValidationError):
        return None


def describe_holder(holder: Holder | None) -> str:
    """Return in words which process a lock file names; the file names none if the process has just started."""
    if holder is None:
        return "a process that has just started"
    return f"process {holder.pid} on host {one_line(holder.host)}"


def _refusal(folder: Path, holder: Holder | None) -> UserError:
    return UserError(
        f"another run or conversion ({describe_holder(holder)}) is writing to {folder}; wait until it ends, stop it, "
        "or choose another folder"
    )
