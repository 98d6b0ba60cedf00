"""The signals that end launchers and tools, and steps of tools that must not be interrupted."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from maskmoe.processes.interruption import handling_signals

SIGNALS_THAT_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals after which a launcher stops the run. The launcher sends `SIGTERM` to the ranks for each of them."""

SIGNALS_THAT_END_TOOLS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a command that is no training."""

SHUTDOWN_TIMEOUT = 600
"""The seconds for which a launcher waits, by default, for a last checkpoint after a signal."""

SHUTDOWN_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""torch's environment variable for these seconds."""


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
