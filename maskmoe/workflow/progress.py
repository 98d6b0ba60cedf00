"""Show how far a stage is, on one line that is rewritten."""

import time
from collections.abc import Callable
from shutil import get_terminal_size
from typing import TextIO

from tqdm import tqdm

from maskmoe.workflow.training_log import IterationRecord, ValidationRecord, parse_line

_SEPARATOR = " · "
_BAR = "{desc} {percentage:.0f}% {bar:10} {n_fmt}/{total_fmt}"


class StageProgress:
    """Describes the state of a running stage from the lines that the stage prints.

    Args:
        title: title of the stage.
        seq_length: tokens in a sample.
        clock: returns the time in seconds; tests pass their own.
    """

    def __init__(self, title: str, seq_length: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.title = title
        self._seq_length = seq_length
        self._clock = clock
        self._start = clock()
        # The first and the newest record of training, each with the time at which the record was read. If the ranks
        # have gone back to an earlier iteration, the records before that are left out.
        self._records: list[tuple[IterationRecord, float]] = []
        self._validation: ValidationRecord | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the stage was started."""
        return self._clock() - self._start

    def read(self, line: str) -> None:
        """Update the state with a line of the stage's output."""
        record = parse_line(line)
        if isinstance(record, ValidationRecord):
            self._validation = record
        elif isinstance(record, IterationRecord):
            went_back = bool(self._records) and record.iteration <= self._records[-1][0].iteration
            self._records = [*([] if went_back else self._records[:1]), (record, self._clock())]

    def __str__(self) -> str:
        if not self._records:
            return f"{self.title} {format_seconds(self.seconds)}"
        record, _ = self._records[-1]
        # tqdm wants an elapsed time even for a format that does not show the time.
        bar = tqdm.format_meter(record.iteration, record.total, elapsed=0, prefix=self.title, bar_format=_BAR)
        loss = f"loss {record.loss:.2f}" if record.loss is not None else "loss is not a number"
        speed = f"{record.batch * self._seq_length / record.seconds:,.0f} tokens/s"
        validation = [f"valid {self._validation.loss:.2f}"] if self._validation else []
        return _SEPARATOR.join([bar, loss, speed, f"ETA {self._remaining_time()}", *validation])

    def _remaining_time(self) -> str:
        """Estimate the remaining time by the wall clock, so that evaluations and checkpoints count."""
        if len(self._records) < 2:
            return "?"
        (first, start), (newest, now) = self._records
        pace = (now - start) / (newest.iteration - first.iteration)
        return format_seconds(max(0.0, pace * (newest.total - newest.iteration) - (self._clock() - now)))


def format_seconds(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours if there are any: `0:07`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """Shows the state on one line of a terminal; elsewhere prints the state from time to time on a line of its own.

    Args:
        stream: stream to write to.
        interval: seconds between two lines if the stream is not a terminal.
        clock: returns the time in seconds; tests pass their own.
    """

    def __init__(self, stream: TextIO, interval: float = 15.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._rewrite = tqdm.status_printer(stream) if stream.isatty() else None
        self._next = clock() + interval

    def update(self, state: str) -> None:
        """Show a state that the next state or line replaces."""
        if self._rewrite is not None:
            self._rewrite(_shorten(state, get_terminal_size().columns - 1))
        elif self._clock() >= self._next:
            self.print(state)

    def print(self, text: str = "") -> None:
        """Write a line that stays."""
        self.clear()
        print(text, file=self._stream, flush=True)
        self._next = self._clock() + self._interval

    def clear(self) -> None:
        """Remove the state that is shown."""
        if self._rewrite is not None:
            self._rewrite("")
            self._stream.write("\r")


def _shorten(state: str, width: int) -> str:
    """Return as many whole parts of the state as fit, but at least the beginning of the first part."""
    while len(state) > width and _SEPARATOR in state:
        state = state.rpartition(_SEPARATOR)[0]
    return state[:width]
