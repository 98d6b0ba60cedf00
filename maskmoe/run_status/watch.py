"""Shows the status of a run again and again until the run ends."""

import time
from collections.abc import Callable
from shutil import get_terminal_size
from typing import TextIO

from maskmoe.run_status.liveness import State
from maskmoe.run_status.status import Status

_RESTART_SECONDS = 120.0  # within which a launcher starts a run again


class Screen:
    """Shows a text that the next text replaces; if the output is no terminal, prints the texts one after another.

    Args:
        stream: stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()

    def show(self, text: str) -> None:
        """Show a text. A text that is longer than the terminal is cut, because a terminal cannot replace more."""
        if self._is_terminal:
            lines, height = text.splitlines(), get_terminal_size().lines - 1
            if len(lines) > height:
                lines = [*lines[: height - 1], f"… {len(lines) - height + 1} more lines: enlarge the terminal"]
            # Go to the first line, replace each line, and clear the rest: a screen cleared at once would flicker.
            text = "\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J"
        print(text, file=self._stream, end="" if self._is_terminal else "\n", flush=True)


def follow(
    read: Callable[[], Status],
    show: Callable[[Status], None],
    seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Show the status until the run ends. A run that stops is watched for two minutes more: it may be restarted.

    Args:
        read: reads the status.
        show: shows the status.
        seconds: time between two updates.
        sleep: waits; tests pass their own.
        clock: returns the time in seconds; tests pass their own.
    """
    last_running: float | None = None
    while True:
        status = read()
        show(status)
        state = status.liveness.state
        if state is State.RUNNING:
            last_running = clock()
        elif state is State.FINISHED or last_running is None or clock() - last_running > _RESTART_SECONDS:
            return
        sleep(seconds)
