"""The console of a rank: it shows our own lines, and writes what Megatron prints to the rank's log file.

Megatron prints about a thousand lines before the first iteration, and one of 300 characters for each iteration. They go
to `logs/rankN.log` in the run folder. Errors, tracebacks, and everything that is written to stderr or by libraries in
C++ reach the console unchanged.

This module imports nothing that takes long, because it prints the first line of a run.
"""

import logging
import os
import re
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

VERBOSE_FLAG = "--verbose"
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_MOST_HIDDEN_LINES = 20_000
_LAST_LINES = 15
_SECONDS_BETWEEN_LINES = 10.0  # of a progress bar without a terminal

# The lines of Megatron that the console shows.
_SHOWN = re.compile(
    r"\s*(\[[^]]*\] )?(successfully (loaded|saved) checkpoint|validation loss at|error\b)", re.IGNORECASE
)


class Console:
    """The console of one rank, and the log file that takes what the console does not show.

    Until `route` is called, and with `--verbose`, everything reaches the console.

    Attributes:
        log: The log file; None if there is none.
    """

    def __init__(self) -> None:
        self.log: TextIO | None = None
        self._stdout: TextIO | None = None
        self._progress: TextIO | None = None
        self._is_rank = self._is_routed = False
        self._is_loading = True
        self._hidden: deque[str] = deque(maxlen=_MOST_HIDDEN_LINES)
        self._lock = threading.RLock()
        self._phase = ""

    def route(self, progress: TextIO) -> None:
        """Route what this process prints, logs and warns of; `progress`, stdout or stderr, takes the progress lines."""
        self._stdout, self._progress, self._is_rank = sys.stdout, progress, True
        if VERBOSE_FLAG in sys.argv[1:]:
            return
        self._is_routed = True
        sys.stdout = _LineRouter(self, sys.stdout)
        warnings.showwarning = self._take_warning
        self.route_logging()

    def route_logging(self) -> None:
        """Route the root logger; call this again after imports that give the root logger handlers of their own."""
        if self._is_routed:
            logging.basicConfig(handlers=[_LogHandler(self)], level=logging.INFO, force=True)

    def open_log(self, folder: Path | None) -> None:
        """Write the log to `FOLDER/logs/rankN.log` from now on, with the lines so far; without a folder, nowhere."""
        if not self._is_routed or folder is None:
            return
        path = folder / "logs" / f"rank{os.environ.get('RANK', '0')}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open until the process ends
        except OSError as error:
            self.say(f"note: cannot write {path}: {error.strerror}; the log of this rank is not kept")
            return
        header = f"==== started {time.strftime('%Y-%m-%d %H:%M:%S')} by process {os.getpid()} ====\n"
        with self._lock, suppress(OSError):
            self.log = log
            log.writelines([header, *self._hidden])

    def say(self, line: str, rank: int = 0) -> None:
        """Print one or several lines of our own on one rank, the last one for -1."""
        own_rank, ranks = rank_of_process()
        if own_rank == rank % ranks:
            self._show(line + "\n")

    def load(self, phase: str) -> None:
        """Say what the run does before its first iteration; only in the first rank, once for each phase."""
        if phase == self._phase or not self._is_rank or os.environ.get("RANK", "0") != "0":
            return
        self._phase = phase
        self.say(f"loading: {phase}")

    def end_of_loading(self) -> None:
        """Note that the first iteration begins. If progress goes to stderr, leave stdout to the result from now on."""
        self._is_loading = False
        if self._stdout is not None and self._progress is not self._stdout:
            sys.stdout = self._stdout

    def show_last_lines(self) -> None:
        """Print the newest lines that were not shown to stderr: they may say why the process ends while it loads."""
        if self._is_loading:
            with self._lock:
                lines = "".join(self._hidden).splitlines(keepends=True)
            self._show("".join(lines[-_LAST_LINES:]), sys.stderr)

    def take_line(self, line: str) -> None:
        """Show or log one line that was printed to stdout, with its end."""
        if _SHOWN.match(line):
            self._show(line)
        else:
            self._keep(line)

    def take_log(self, record: logging.LogRecord, text: str) -> None:
        """Show or log the text of a record of Python's logging; errors, and our own warnings, are shown."""
        is_ours = record.name.partition(".")[0] == "maskmoe"
        if record.levelno >= (logging.WARNING if is_ours else logging.ERROR):
            self._show(text + "\n")
        else:
            self._keep(text + "\n")

    def _take_warning(
        self, message: Any, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno)
        if filename.startswith(_PACKAGE):
            self._show(text, sys.stderr)
        else:
            self._keep(text)

    def _show(self, text: str, stream: TextIO | None = None) -> None:
        """Write text at once, by default among the progress lines.

        A full disk must not end the run, so text for which there is no space is lost.
        """
        stream = stream or self._progress or sys.stdout
        with self._lock:
            try:
                stream.write(text)
                stream.flush()
            except BrokenPipeError:
                raise  # nobody reads the output: `run_tool` ends the process
            except OSError:
                pass

    def _keep(self, text: str) -> None:
        """Keep what the console does not show. A full disk must not end the run, so the log may lack lines."""
        with self._lock, suppress(OSError):
            self._hidden.append(text)
            if self.log is not None:
                self.log.write(text)


class _LineRouter:
    """Replaces `sys.stdout`, hands complete lines to the console, and leaves all other questions to the stream."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console = console
        self._stream = stream
        self._unfinished = ""

    def write(self, text: str) -> int:
        """Take text; a line is handed on when it is complete."""
        *lines, self._unfinished = (self._unfinished + text).split("\n")
        for line in lines:
            self._console.take_line(line + "\n")
        return len(text)

    def flush(self) -> None:
        """Do nothing: complete lines are flushed at once, and the rest of a line cannot be judged yet."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _LogHandler(logging.Handler):
    """Hands the records of Python's logging to the console, in the format of `logging.basicConfig`."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter(logging.BASIC_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        try:
            self._console.take_log(record, self.format(record))
        except Exception:
            self.handleError(record)


console = Console()
"""The console of this process; like `sys.stdout`, there is one."""


def rank_of_process() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as torchrun's variables say."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def progress_bar[Step](steps: Sequence[Step], description: str, unit: str) -> Iterable[Step]:
    """Return the steps with a progress bar on stderr, on the first rank; without a terminal, a line now and then.

    Work of less than a second has no bar.
    """
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES
    is_first = os.environ.get("RANK", "0") == "0"
    return tqdm(steps, desc=description, unit=unit, mininterval=interval, delay=1, disable=not is_first)


def hide_foreign_warnings() -> None:
    """Ignore the warnings of other packages, in a process that Megatron spawned and that prints for itself."""
    if VERBOSE_FLAG not in sys.argv[1:]:
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(?!maskmoe\b)")
