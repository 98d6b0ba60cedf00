"""Holds signals back during a step that must not be interrupted halfway."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def deferring_signals() -> Iterator[None]:
    """Hold SIGINT, SIGTERM and SIGHUP back until the block ends; then handle them as before the block.

    Use a short block: nothing reacts to Ctrl-C inside it. Blocking signals by the mask of the thread would not hold
    them back, because `multiprocessing` unblocks SIGINT and SIGTERM when it starts its resource tracker. Outside the
    main thread nothing changes, because Python handles signals on the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    # An ignored signal stays ignored, and a handler that Python did not install (None) cannot be restored.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for number in handlers:
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)
