"""What Linux offers so that processes do not outlive those that they work for."""

import ctypes
import os
import signal
import sys

# Of <sys/prctl.h>.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have this process signalled when its parent ends, however that ends; on Linux only.

    Args:
        parent: the process that started this one; it may have ended already.
        by: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        if os.getppid() != parent:
            os.kill(os.getpid(), by)


def adopt_orphans() -> None:
    """Let descendants whose parent ends become children of this process; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
