"""Let only one command at a time work in a run folder."""

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import psutil

from maskmoe.errors import UserError
from maskmoe.processes.child_process import is_alive, send_signal
from maskmoe.processes.folder_lock import NO_LOCKS, locked_folder

_SECONDS_TO_GIVE_UP = 30.0

RunLock = TextIO
"""The open and locked lock file of a run folder.

Every process that has the file as its standard input holds the lock, too. The lock is therefore free only after all
processes of a command have ended, even if the command itself was killed.
"""


@contextmanager
def locked(path: Path, seconds_to_end: float = 10.0) -> Iterator[RunLock]:
    """Hold a lock file during the block.

    On a file system without `flock`, `locked_folder` lets only one command at a time work in the folder. Processes that
    a killed command has left behind are then neither found nor ended.

    Args:
        path: path of the file, which is created if missing.
        seconds_to_end: how many seconds the processes that a killed command has left behind may take to end. After
            that time the processes are killed.

    Raises:
        UserError: another command works in the folder.
    """
    with open(path, "a+", encoding="utf-8", errors="replace") as lock, ExitStack() as stack:
        try:
            _acquire(lock, path.parent, seconds_to_end)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            stack.enter_context(locked_folder(path.parent))
        # The file holds the number of the process that owns the lock.
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield lock


def _acquire(lock: RunLock, folder: Path, seconds_to_end: float) -> None:
    """Lock the file. If the lock's owner is gone, wait for the owner's remaining processes, then kill them."""
    start = time.monotonic()
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
        if not owner.isdecimal() or is_alive(int(owner)):
            name = f"process {owner}" if owner else "just started"
            raise UserError(f"another command ({name}) is at work in {folder}; give another --run-dir")
        waited = time.monotonic() - start
        if waited > seconds_to_end:
            send_signal(other_holders(lock), signal.SIGKILL)
        if waited > seconds_to_end + _SECONDS_TO_GIVE_UP:
            raise UserError(
                f"processes of an earlier command (process {owner}, which has ended) still work in {folder}: "
                "end these processes, or give another --run-dir"
            )
        time.sleep(0.2)


def other_holders(lock: RunLock) -> set[psutil.Process]:
    """Return the processes that have the lock as standard input, with all their children (on Linux only)."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.path.samestat(os.stat(f"/proc/{process.pid}/fd/0"), os.fstat(lock.fileno())):
                found.update([process, *process.children(recursive=True)])
    return found
