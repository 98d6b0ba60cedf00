"""Reads TensorBoard's event files, again and again while a run writes them."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskmoe.run_report.event_file import Block, EventFile, Points
from maskmoe.run_report.history import History
from maskmoe.untrusted import UnusableFile

_PATTERN = "events.out.tfevents.*"
# Megatron logs most scalars twice; the x axis of a tag with this end is the number of samples.
_SAMPLES = " vs samples"
_LOSS = "lm loss"

CLOCK_TIME = "clock time of an iteration"
"""The tag of the seconds between the records of two iterations, which include evaluation and saving."""


def is_over_iterations(tag: str) -> bool:
    """Return whether the x axis of a scalar is the iteration."""
    return not tag.endswith(_SAMPLES)


class Scalar(NamedTuple):
    """One value of a scalar, `seconds` after 1970."""

    tag: str
    step: int
    value: float
    seconds: float


class Text(NamedTuple):
    """One text, such as an argument of Megatron."""

    tag: str
    text: str


class EventFolder:
    """The event files of a run in the order of its starts. Each start of the run writes one file.

    Args:
        folder: the folder in `--tensorboard-dir`. It may not exist yet.
        is_wanted: decides by the tag of a scalar whether its values are read.

    Attributes:
        damaged: the files that are not intact; they are read up to the damage.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[str], bool] = is_over_iterations) -> None:
        self.damaged: list[Path] = []
        self._folder, self._is_wanted = folder, is_wanted
        self._files: dict[Path, EventFile] = {}

    def read_blocks(self) -> Iterator[tuple[Path, Block]]:
        """Yield what was written since the last call, with the file. An incomplete last record is left to the next.

        A file that cannot be read is skipped.
        """
        for path in event_files(self._folder):
            file = self._files.setdefault(path, EventFile(path, self._is_wanted))
            with suppress(UnusableFile):
                for block in file.read_new():
                    yield path, block
        self.damaged = [path for path, file in self._files.items() if file.is_damaged]

    def read_new(self) -> Iterator[Scalar | Text]:
        """Yield the values and texts that were written since the last call; values of one scalar in their order."""
        for _, block in self.read_blocks():
            for tag, text in block.texts.items():
                yield Text(tag, text)
            for tag, points in block.scalars.items():
                for step, value, seconds in zip(*(column.tolist() for column in points), strict=True):
                    yield Scalar(tag, step, value, seconds)

    def unread_bytes(self) -> int:
        """Return how many bytes the next call will read."""
        total = 0
        for path in event_files(self._folder):
            with suppress(OSError):
                total += path.stat().st_size - (self._files[path].num_read if path in self._files else 0)
        return total


class EventHistory:
    """A history that grows with the event files of a run.

    Args:
        folder: the folder of the event files.
        is_wanted: decides by the tag of a scalar whether the history has it.

    Attributes:
        history: what the calls of `update` have read.
        events: the event files.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[str], bool] = is_over_iterations) -> None:
        self.history = History()
        self.events = EventFolder(folder, is_wanted)
        self._file: Path | None = None
        self._newest_loss: tuple[int, float] | None = None

    def update(self) -> History:
        """Read what is new, and return the history."""
        for path, block in self.events.read_blocks():
            self._add(path, block)
        return self.history

    def _add(self, path: Path, block: Block) -> None:
        self.history.texts |= block.texts
        if block.first_step is None or block.newest is None:
            return
        if path != self._file:
            self.history.start(block.first_step, block.oldest)
            self._file, self._newest_loss = path, None
        for tag, points in block.scalars.items():
            self.history.extend(tag, points.steps, points.values)
        self.history.newest = block.newest
        if _LOSS in block.scalars:
            self._measure_time(block.scalars[_LOSS])

    def _measure_time(self, losses: Points) -> None:
        steps, seconds = losses.steps, losses.seconds
        if self._newest_loss is not None:
            step, time = self._newest_loss
            steps, seconds = np.append(step, steps), np.append(time, seconds)
        self._newest_loss = int(steps[-1]), float(seconds[-1])
        distances = np.diff(steps)
        has_time = distances > 0
        times = np.diff(seconds)[has_time] / distances[has_time]
        self.history.extend(CLOCK_TIME, steps[1:][has_time], times)


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, in the order in which they were begun; the folder need not exist."""
    return sorted(folder.glob(_PATTERN))
