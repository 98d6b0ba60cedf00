"""Let only one command at a time work in a run folder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from maskmoe.errors import UserError

_SECONDS_TO_END = 10.0
_SECONDS_TO_GIVE_UP = 30.0


@dataclass(frozen=True)
class RunLock:
    """The locked lock file of a run folder.

    Every process that has the file as its standard input holds the lock, too. The lock is therefore free only after all
    processes of a command have ended, even if the command itself was killed.

    Attributes:
        path: path of the file.
        descriptor: descriptor of the open file.
    """

    path: Path
    descriptor: int

    def other_holders(self) -> set[psutil.Process]:
        """Return the processes that have the lock as standard input, with all their children (on Linux only)."""
        found: set[psutil.Process] = set()
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.path.samestat(os.stat(f"/proc/{process.pid}/fd/0"), os.fstat(self.descriptor)):
                    found.update([process, *process.children(recursive=True)])
        return found

    def kill_other_holders(self) -> None:
        """Kill all processes that a stage has left behind."""
        for process in self.other_holders():
            with suppress(psutil.NoSuchProcess):
                process.kill()


@contextmanager
def locked(path: Path, seconds_to_end: float = _SECONDS_TO_END) -> Iterator[RunLock]:
    """Hold a lock file during the block.

    Args:
        path: path of the file, which is created if missing.
        seconds_to_end: how many seconds the processes that a killed command has left behind may take to end. After
            that time the processes are killed.

    Raises:
        UserError: another command works in the folder.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        lock = RunLock(path, descriptor)
        _acquire(lock, seconds_to_end)
        # The file holds the number of the process that owns the lock.
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield lock
    finally:
        os.close(descriptor)


def _acquire(lock: RunLock, seconds_to_end: float) -> None:
    """Lock the file. If the lock's owner is gone, wait for the owner's remaining processes, then kill them."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            owner = _read_owner(lock.descriptor)
        folder = lock.path.parent
        if owner is None or _is_alive(owner):
            name = f"process {owner}" if owner else "just started"
            raise UserError(f"another command ({name}) is at work in {folder}; give another --run-dir")
        waited = time.monotonic() - start
        if waited > seconds_to_end:
            lock.kill_other_holders()
        if waited > seconds_to_end + _SECONDS_TO_GIVE_UP:
            raise UserError(
                f"processes of an earlier command (process {owner}, which has ended) still work in {folder}: "
                "end these processes, or give another --run-dir"
            )
        time.sleep(0.2)


def _read_owner(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
    return int(text) if text.isdigit() else None


def _is_alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
