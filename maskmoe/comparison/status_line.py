"""One line of a terminal that is rewritten to show the state of long work."""

import time
from shutil import get_terminal_size
from typing import TextIO

_SECONDS_BETWEEN_LINES = 60.0
_CLEAR = "\r\x1b[K"


class StatusLine:
    """Shows the state of work: on a terminal on one line that is rewritten, elsewhere as a line every minute.

    Args:
        stream: where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._next = 0.0

    def update(self, state: str) -> None:
        """Show the state."""
        if self._is_terminal:
            print(f"{_CLEAR}{state[: get_terminal_size().columns - 1]}", end="", file=self._stream, flush=True)
        elif time.monotonic() >= self._next:
            print(state, file=self._stream, flush=True)
            self._next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def print(self, text: str) -> None:
        """Print lines that stay."""
        print(f"{_CLEAR if self._is_terminal else ''}{text}", file=self._stream, flush=True)
