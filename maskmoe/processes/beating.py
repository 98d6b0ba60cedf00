"""Shows by regular signs of life that a process works, for readers that cannot see the process itself."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


@contextmanager
def beating(beat: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function every few seconds, on a thread of its own, until the block ends.

    Args:
        beat: gives a sign of life, such as touching a file. An OSError is dropped: a file system may fail for a while.
        seconds: the time between two calls.
    """
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
