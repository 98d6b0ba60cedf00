"""The signals that stop a run, the exit codes of a stopped run, and steps that must not be interrupted."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS_THAT_SAVE = (signal.SIGTERM, signal.SIGUSR1)
"""The signals after which a rank saves a checkpoint: Slurm, Kubernetes and torchrun announce a stop by them."""

SIGNALS_THAT_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals after which a launcher stops the run. The launcher sends `SIGTERM` to the ranks for each of them."""

SIGNALS_THAT_END_TOOLS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command that is no training."""

Handler = Callable[[int, FrameType | None], object] | signal.Handlers

SHUTDOWN_TIMEOUT = 600
"""The seconds for which a launcher waits, by default, for a last checkpoint after a signal."""

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torch's environment variable for these seconds."""

EXIT_REQUEUE = 75
"""A signal stopped the run, which saved a checkpoint and can resume. The code is `EX_TEMPFAIL` of sysexits.h."""


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


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block ends; then handle them as before the block.

    Use a short block: nothing reacts to Ctrl-C inside it. Do not block signals by the thread's mask: `multiprocessing`
    unblocks SIGINT and SIGTERM when it starts its resource tracker. Outside the main thread nothing changes.
    """
    received: list[int] = []
    try:
        with handling_signals(SIGNALS_THAT_END_TOOLS, lambda number, _frame: received.append(number)):
            yield
    finally:
        for number in received:
            signal.raise_signal(number)
