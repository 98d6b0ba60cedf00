"""The console of a rank, which shows our own lines, and its log file, which takes what other packages print.

Stderr reaches the console unchanged. This module imports quickly, because it prints the first line of a run.
"""

import io
import logging
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

_MOST_LINES_BEFORE_LOG = 20_000
_LAST_LINES = 15
_SECONDS_BETWEEN_LINES = 10.0  # of a progress bar without a terminal

# The lines of Megatron that the console shows, too.
_SHOWN = re.compile(r"\s*(\[[^]]*\] )?(successfully (loaded|saved) checkpoint|validation loss at)")


class RankLog(io.TextIOBase):
    """Replaces `sys.stdout` of a rank: keeps what is printed until the log file is open, then writes it there.

    `console` also gets the lines that match `_SHOWN`. A full disk must not end the run, so text without space is lost.
    """

    def __init__(self, console: TextIO) -> None:
        self._console = console
        self._kept = deque[str](maxlen=_MOST_LINES_BEFORE_LOG)
        self._file: TextIO | None = None

    def open(self, path: Path) -> None:
        """Write to a file from now on, with the text so far. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self.write(f"==== started {time.strftime('%Y-%m-%d %H:%M:%S')} by process {os.getpid()} ====\n")
        self.write("".join(self._kept))

    def write(self, text: str) -> int:
        """Write text to the log; `print` writes a line at once, and the end of the line in a second call."""
        if _SHOWN.match(text):
            _write(self._console, text.rstrip("\n") + "\n")
        if self._file is None:
            self._kept.append(text)
        else:
            _write(self._file, text)
        return len(text)

    def last_lines(self) -> str:
        """Return the newest lines before the log file was opened; none if the file has them."""
        lines = "".join(self._kept).splitlines(keepends=True) if self._file is None else []
        return "".join(lines[-_LAST_LINES:])


def _write(stream: TextIO, text: str) -> None:
    with suppress(OSError):
        stream.write(text)
        stream.flush()


class Console:
    """The console of one rank. Until `route` is called, and with `--verbose`, everything reaches the console."""

    def __init__(self) -> None:
        self.log: RankLog | None = None  # takes what other packages print
        self._result: TextIO | None = None
        self._progress: TextIO | None = None

    @property
    def result(self) -> TextIO:
        """The stream for the result of a command: stdout."""
        return self._result or sys.stdout

    def route(self, progress: TextIO) -> None:
        """Send what this process prints to its log; `progress`, stdout or stderr, takes our own lines."""
        self._result, self._progress = sys.stdout, progress
        if "--verbose" not in sys.argv[1:]:
            self.log = RankLog(progress)
            sys.stdout = self.log
            self.route_logging()

    def route_logging(self) -> None:
        """Send warnings and the root logger's lines to the log, and errors to stderr; imports may undo this."""
        if self.log is not None:
            errors = logging.StreamHandler(sys.stderr)
            errors.setLevel(logging.ERROR)
            logging.basicConfig(handlers=[logging.StreamHandler(self.log), errors], level=logging.INFO, force=True)
            logging.captureWarnings(True)

    def open_log(self, folder: Path | None) -> None:
        """Write the log to `FOLDER/logs/rankN.log` from now on, with the lines so far; without a folder, nowhere."""
        if self.log is None or folder is None:
            return
        path = folder / "logs" / f"rank{os.environ.get('RANK', '0')}.log"
        try:
            self.log.open(path)
        except OSError as error:
            self.say(f"note: cannot write {path}: {error.strerror}; the log of this rank is not kept")

    def say(self, line: str, rank: int = 0) -> None:
        """Print one or several lines of our own on one rank, the last one for -1."""
        own_rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if own_rank == rank % ranks:
            _write(self._progress or sys.stdout, line + "\n")

    def load(self, phase: str) -> None:
        """Say on the first rank what the run does before its first iteration."""
        if self._progress is not None:
            self.say(f"loading: {phase}")


console = Console()
"""The console of this process; like `sys.stdout`, there is one."""


def progress_bar[Step](steps: Sequence[Step], description: str, unit: str) -> Iterable[Step]:
    """Return the steps with a progress bar on stderr, on the first rank; without a terminal, a line now and then.

    Work of less than a second has no bar.
    """
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    is_first = os.environ.get("RANK", "0") == "0"
    return tqdm(steps, desc=description, unit=unit, mininterval=interval, delay=1, disable=not is_first)
