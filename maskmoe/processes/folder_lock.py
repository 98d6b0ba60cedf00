"""Lets only one run or conversion at a time write to a folder, also across the nodes of a shared file system.

The holder has a POSIX lock on a file in the folder. The kernel frees the lock when the holder ends, however it ends,
and child processes do not inherit the lock. Network file systems with a lock service show the lock to all nodes. For
file systems without one, the holder also touches the file every few seconds, and a lock of another host counts as free
once the file has not been touched for a while. The clocks of the hosts need not agree.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from maskmoe.errors import UserError
from maskmoe.files.untrusted import UnusableFile, open_regular

LOCK_NAME = ".run.lock"
"""Name of the lock file in a locked folder."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""Error numbers of a file system without locks."""

_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 35.0  # three heartbeats and some time for the caches of a network file system
_END_SECONDS = 20.0  # which the processes of a run that has just ended may take
_LOOK_SECONDS = 1.0
_POLL_SECONDS = 0.5
_MAX_BYTES = 4096
_IS_HELD = (errno.EACCES, errno.EAGAIN)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_FLOCK = "hhqqi0q"  # the struct flock of Linux: type, whence, start, length, process


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: name of its host.
        pid: its process id on that host.
        started: when the process started, in seconds since the epoch, which tells it from a later process of this id.
        pid_namespace: the boot of the machine and the namespace in which the process has its id; empty if unknown.
            Hosts may have equal names: pods in the network of their host, or containers with a fixed name.
    """

    host: str
    pid: int
    started: float
    pid_namespace: str = ""

    @classmethod
    def this_process(cls) -> Self:
        """Return the holder that this process would be."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), _pid_namespace())

    @property
    def is_here(self) -> bool:
        """Whether the process ran on this host, so that its id shows whether it still runs.

        A holder without a namespace, in a lock file of an earlier version, counts as a process of another host, whose
        heartbeat shows whether it runs. On hosts that do not know their own namespace, only the names are compared.
        """
        return (self.host, self.pid_namespace) == (socket.gethostname(), _pid_namespace())

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs on this host."""
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1
        except psutil.Error:
            return False


@dataclass(frozen=True)
class LockState:
    """The state of a folder's lock, as a process sees the lock without locking anything.

    Attributes:
        holder: the process that the lock file names; None if the file names none.
        is_held: whether a process of any host holds the lock; None if the file system does not show locks.
        touched: when the lock file was last touched, in seconds since 1970 on the clock of the file's server.
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
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if missing, during the block.

    Raises:
        UserError: another process holds the lock, or the lock file cannot be made.
    """
    path = folder / LOCK_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path)
    except OSError as error:
        raise UserError(f"cannot lock {folder}: {error.strerror}; choose another --save") from error
    ended = threading.Event()
    heartbeat = threading.Thread(target=_touch, args=(lock, ended), name="heartbeat of the run's lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        ended.set()
        heartbeat.join()
        with suppress(OSError):
            path.unlink()
        os.close(lock)  # frees the lock


def check_unlocked(folder: Path) -> None:
    """Check that no process of this host, or of a host whose locks this host can see, holds the lock of a folder.

    Raises:
        UserError: another process holds the lock.
    """
    path = folder / LOCK_NAME
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        holder = _read(lock)
        if _try_lock(lock) is False and holder is not None:
            raise _refusal(path, holder)
    finally:
        os.close(lock)


def _acquire(path: Path) -> int:
    """Lock the file and write this process into it; return the file's descriptor.

    Raises:
        UserError: another process holds the lock.
    """
    start, gone = time.monotonic(), None
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        is_locked = _try_lock(lock)
        holder = _read(lock)
        if is_locked is False:
            os.close(lock)
            is_ending = holder is None or (holder.is_here and not holder.is_alive)
            # A process that only looks whether the lock is free holds it for a moment.
            if time.monotonic() - start > (_END_SECONDS if is_ending else _LOOK_SECONDS):
                raise _refusal(path, holder)
            time.sleep(_POLL_SECONDS)
            continue
        if holder is not None and holder not in (gone, Holder.this_process()):
            os.close(lock)  # reading the file's time would free the lock anyway
            if _is_held_elsewhere(path, holder, is_locked):
                raise _refusal(path, holder)
            gone = holder
            continue
        # A holder that ended meanwhile has removed the file, and another process may have made a new one.
        with suppress(OSError):
            if os.path.samestat(os.fstat(lock), os.stat(path)):
                content = json.dumps(asdict(Holder.this_process())).encode()
                os.ftruncate(lock, 0)
                os.pwrite(lock, content, 0)
                return lock
        os.close(lock)


def _try_lock(lock: int) -> bool | None:
    """Lock an open file without waiting; return whether this process has the lock, None if there are no locks."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_HELD:
            return False
        if error.errno in NO_LOCKS:
            return None
        raise
    return True


def _is_locked(lock: int) -> bool | None:
    """Return whether another process has locked an open file; None if there are no locks."""
    question = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        answer = fcntl.fcntl(lock, fcntl.F_GETLK, question)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK


def _is_held_elsewhere(path: Path, holder: Holder, is_locked: bool | None) -> bool:
    """Return whether the process in the lock file still runs, although the file system shows no lock of it."""
    if holder.is_here:
        return is_locked is None and holder.is_alive
    # Wait for a heartbeat. A new `stat` of the path asks the server again.
    start, first = time.monotonic(), _touched(path)
    while time.monotonic() - start < _STALE_SECONDS:
        time.sleep(_POLL_SECONDS)
        now = _touched(path)
        if now is None:
            return False
        if now != first:
            return True
    return False


def _touched(path: Path) -> int | None:
    """Return when a file was touched, in nanoseconds of its server's clock; None if the file is gone."""
    try:
        with open(path, "rb"):  # network file systems refresh their caches on opening
            return path.stat().st_mtime_ns
    except OSError:
        return None


def _touch(lock: int, ended: threading.Event) -> None:
    """Touch an open file every few seconds."""
    while not ended.wait(_HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(lock)


def _read(lock: int) -> Holder | None:
    """Return the process that a lock file names, or None."""
    try:
        content = json.loads(os.pread(lock, _MAX_BYTES, 0))
        host, pid, started = str(content["host"]), int(content["pid"]), float(content["started"])
        return Holder(host, pid, started, str(content.get("pid_namespace", "")))
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None


def _pid_namespace() -> str:
    """Return what tells the process ids that this process sees from those of other hosts; empty if unknown."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _refusal(path: Path, holder: Holder | None) -> UserError:
    who = "a process that has just started" if holder is None else f"process {holder.pid} on host {holder.host}"
    return UserError(
        f"another run or conversion ({who}) is writing to {path.parent}; wait until it ends, stop it, or choose "
        "another folder"
    )
