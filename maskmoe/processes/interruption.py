"""The signals that stop a run, its exit code, and processes that end with their parent."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS_THAT_SAVE = (signal.SIGTERM, signal.SIGUSR1)
"""The signals after which a rank saves a checkpoint: Slurm, Kubernetes and torchrun announce a stop by them."""

EXIT_REQUEUE = 75
"""A signal stopped the run, which saved a checkpoint and can resume. The code is `EX_TEMPFAIL` of sysexits.h."""

RANK_PROCESS = "MASKMOE_RANK_PROCESS"
"""The environment variable of a process that writes checkpoints, with the id of the rank that has started it."""

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def handling_signals(numbers: Iterable[signal.Signals], handler: Handler) -> Iterator[None]:
    """Handle signals by a handler until the block ends, then as before the block.

    An ignored signal stays ignored. Outside the main thread nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if is_main}
    # A handler that Python did not install (None) cannot be restored.
    before = {number: earlier for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def end_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel signal this process when its parent, which may be gone already, exits; only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, by)
        # The kernel does not report a parent that exited before the call.
        if os.getppid() != parent:
            os.kill(os.getpid(), by)
