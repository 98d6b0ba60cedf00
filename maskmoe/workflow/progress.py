"""Reads what training prints, and shows how far a stage is on one line."""

import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

_SEPARATOR = " · "
_RANK = r"^(?:\[rank\d+\]: )?"
_ITERATION = re.compile(
    _RANK + r" \[[^]]+\] iteration +(?P<iteration>\d+)/ *(?P<total>\d+) \|"
    r".* elapsed time per iteration \(ms\): (?P<milliseconds>[\d.]+) \|"
    r".* global batch size: +(?P<batch>\d+) \|"
    r"(?:.* lm loss: (?P<loss>\S+) \|)?"
)
_VALIDATION = re.compile(
    _RANK + r" *validation loss at iteration (?P<iteration>\d+)\b.*?\| lm loss value: (?P<loss>\S+) \|"
)


@dataclass(frozen=True)
class IterationRecord:
    """One line of Megatron's training log, about all iterations since the line before.

    Attributes:
        iteration: the newest one, counted from 1.
        total: iterations of the run.
        seconds: per iteration.
        batch: samples in an iteration.
        loss: mean, in nats per token; None if it was not a number.
    """

    iteration: int
    total: int
    seconds: float
    batch: int
    loss: float | None


@dataclass(frozen=True)
class ValidationRecord:
    """The loss of held-out text, in nats per token, after an iteration."""

    iteration: int
    loss: float


def parse_line(line: str) -> IterationRecord | ValidationRecord | None:
    """What a line of Megatron's log says about training, or None."""
    if match := _ITERATION.match(line):
        return IterationRecord(
            iteration=int(match["iteration"]),
            total=int(match["total"]),
            seconds=float(match["milliseconds"]) / 1000,
            batch=int(match["batch"]),
            loss=_finite(match["loss"]),
        )
    if match := _VALIDATION.match(line):
        return ValidationRecord(int(match["iteration"]), float(match["loss"]))
    return None


def _finite(text: str | None) -> float | None:
    value = float(text) if text is not None else math.nan
    return value if math.isfinite(value) else None


class TrainingHistory:
    """The losses of a run over all its starts: what was repeated after an interruption replaces what was before.

    Attributes:
        iterations, validations: records by iteration.
    """

    def __init__(self, lines: list[str] | None = None):
        self.iterations: dict[int, IterationRecord] = {}
        self.validations: dict[int, ValidationRecord] = {}
        for line in lines or ():
            self.add(line)

    @property
    def training_seconds(self) -> float:
        """What all iterations have taken, each as often as it counts."""
        numbers = sorted(self.iterations)
        return sum(
            (number - before) * self.iterations[number].seconds
            for before, number in zip([0, *numbers], numbers, strict=False)
        )

    def add(self, line: str) -> IterationRecord | ValidationRecord | None:
        """Take a line of the log in; returns what it said."""
        record = parse_line(line)
        if isinstance(record, IterationRecord):
            self.iterations[record.iteration] = record
        elif isinstance(record, ValidationRecord):
            self.validations[record.iteration] = record
        return record


class StageProgress:
    """Describes a stage at work.

    Args:
        title: of the stage.
        seq_length: tokens in a sample.
        clock: seconds, for tests.
    """

    def __init__(self, title: str, seq_length: int, clock: Callable[[], float] = time.monotonic):
        self.title = title
        self._seq_length = seq_length
        self._clock = clock
        self._start = clock()
        self._history = TrainingHistory()
        self._first: tuple[int, float] | None = None
        self._newest: IterationRecord | None = None
        self._newest_validation: ValidationRecord | None = None
        self._eta_at_newest: float | None = None
        self._time_of_newest = self._start

    @property
    def seconds(self) -> float:
        """Since the stage was started."""
        return self._clock() - self._start

    def read(self, line: str) -> None:
        """Take a line of the stage's output in."""
        record = parse_line(line)
        if isinstance(record, ValidationRecord):
            self._newest_validation = record
        elif isinstance(record, IterationRecord):
            now = self._clock()
            if self._first is None:
                self._first = (record.iteration, now)
            else:
                # By the wall clock, so that evaluations and checkpoints on the way count.
                iteration, since = self._first
                pace = (now - since) / (record.iteration - iteration)
                self._eta_at_newest = pace * (record.total - record.iteration)
            self._newest, self._time_of_newest = record, now

    def __str__(self) -> str:
        record = self._newest
        if record is None:
            return f"{self.title} {format_seconds(self.seconds)}"
        parts = [
            f"{record.iteration}/{record.total}",
            f"loss {record.loss:.2f}" if record.loss is not None else "loss is not a number",
            f"{record.batch * self._seq_length / record.seconds:,.0f} tokens/s",
            f"ETA {self._eta()}",
        ]
        if self._newest_validation:
            parts.append(f"valid {self._newest_validation.loss:.2f}")
        return f"{self.title} {_SEPARATOR.join(parts)}"

    def _eta(self) -> str:
        if self._eta_at_newest is None:
            return "?"
        return format_seconds(max(0.0, self._eta_at_newest - (self._clock() - self._time_of_newest)))


def format_seconds(seconds: float) -> str:
    """As minutes and seconds, with hours where there are any: `0:07`, `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _fitting(text: str, width: int) -> str:
    """As many whole parts of the text as fit, but at least a piece of the first."""
    while len(text) > width and _SEPARATOR in text:
        text = text.rpartition(_SEPARATOR)[0]
    return text[:width]


class ProgressLine:
    """On a terminal one line that is written over and over; elsewhere plain lines with some time between them.

    Args:
        stream: to write to.
        interval: seconds between plain lines.
        clock: seconds, for tests.
    """

    def __init__(self, stream: TextIO, interval: float = 15.0, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._is_terminal = stream.isatty()
        self._next = clock() + interval
        self._shown = ""

    def update(self, text: str) -> None:
        """Show a passing state."""
        if self._is_terminal:
            text = _fitting(text, shutil.get_terminal_size().columns - 1)
            if text != self._shown:
                self._write(f"\r{text}\x1b[K")
                self._shown = text
        elif self._clock() >= self._next:
            self.print(text)

    def print(self, text: str = "") -> None:
        """Write what shall stay."""
        self.clear()
        self._write(f"{text}\n")
        self._next = self._clock() + self._interval

    def clear(self) -> None:
        """Take the passing state away."""
        if self._shown:
            self._write("\r\x1b[K")
            self._shown = ""

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
