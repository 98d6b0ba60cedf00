"""Ties the lives of processes together, and ends processes. Some functions do nothing outside Linux."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress

import psutil

# Constants of <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent exits for whatever reason; does nothing outside Linux.

    Args:
        parent: the process id of the process that started this one. It may have exited already.
        by: the signal that this process receives.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        # The kernel does not report a parent that exited before the call.
        if os.getppid() != parent:
            os.kill(os.getpid(), by)


def adopt_orphans() -> None:
    """Make this process the new parent of descendants whose parent exits; does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


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
