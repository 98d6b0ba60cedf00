"""The program that keeps the page of a running training up to date: `python -m maskmoe.run_report.follow`.

Training starts this program with the lowest priority. The program reads its commands from stdin: `UPDATE` writes the
page, `END` writes the page a last time and ends the program. If the training is killed, the program notices this and
ends in the same way. If a page cannot be written, the program prints one line of warning and continues.
"""

import logging
import os
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

from maskmoe.run_report.events import EventHistory
from maskmoe.run_report.page import write_page

UPDATE = b"u"
END = b"e"

# A page is written only if the processor time of all pages stays below this share of the time.
_SHARE_OF_TIME = 0.01
_POLL_SECONDS = 1.0


class Follower:
    """Writes the page of a run again and again.

    Args:
        events: folder of the event files.
        name: name of the run.
        path: the page.
        clock: returns the time in seconds.
        work_clock: returns the processor time of this process in seconds.
    """

    def __init__(
        self,
        events: Path,
        name: str,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        work_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._history = EventHistory(events)
        self._name, self._path = name, path
        self._clock, self._work_clock = clock, work_clock
        self._earliest = clock()
        self._has_warned = False

    def update(self, is_last: bool = False) -> None:
        """Write the page, unless the page before was written too short a time ago; the last page is always written."""
        if not is_last and self._clock() < self._earliest:
            return
        before = self._work_clock()
        try:
            write_page(self._history.update(), self._name, self._path, is_running=not is_last)
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                print(f"warning: {self._path} is not up to date: {error}", file=sys.stderr, flush=True)
        self._earliest = self._clock() + (self._work_clock() - before) / _SHARE_OF_TIME


def main() -> None:
    """Follow the run whose event folder, name and page are on the command line."""
    events, name, path = sys.argv[1:]
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # no notices of its font cache
    parent = os.getppid()
    follower = Follower(Path(events), name, Path(path))
    while True:
        is_readable, _, _ = select.select([0], [], [], _POLL_SECONDS)
        commands = os.read(0, 4096) if is_readable else b""
        # The pipe's end may stay open in other children of a training that was killed.
        if END in commands or (is_readable and not commands) or os.getppid() != parent:
            follower.update(is_last=True)
            return
        if commands:
            follower.update()


if __name__ == "__main__":
    main()
