"""Finds out whether processes live, and ties their lives together."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

# A constant of <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1

RANK_PROCESS = "MASKMOE_RANK_PROCESS"
"""The environment variable of a process that writes checkpoints, with the id of the rank that has started it."""


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent, which may be gone already, exits; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        # The kernel does not report a parent that exited before the call.
        if os.getppid() != parent:
            os.kill(os.getpid(), by)


def is_alive(process: int) -> bool:
    """Return whether the process with this id exists and has not exited. A zombie has exited."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send_signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to those of the processes that still exist."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or that leads a node of a run.

    Attributes:
        started: When the process started, in seconds since the epoch, which tells it from a later process of this id.
        pid_namespace: The boot of the machine and the namespace of the process id; empty if unknown. Hosts may have
            equal names: pods in the network of their host, or containers with a fixed name.
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

        A holder without a namespace counts as a process of another host. A host that does not know its own namespace
        compares only the names.
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

    @property
    def has_ended(self) -> bool:
        """Whether the process ran on this host and has ended; False for a process of another host."""
        return self.is_here and not self.is_alive


def _pid_namespace() -> str:
    """Return what tells the process ids that this process sees from those of other hosts; empty if unknown."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


@contextmanager
def beating(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Give a sign of life every few seconds, on a thread of its own, until the block ends; an OSError is dropped."""
    has_ended = threading.Event()

    def keep_beating() -> None:
        while not has_ended.wait(seconds):
            with suppress(OSError):
                beat()

    thread = threading.Thread(target=keep_beating, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
