"""Ties the lives of processes together."""

import ctypes
import os
import signal
import sys

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
