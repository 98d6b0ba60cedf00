"""Reads TensorBoard's event files, again and again while a run writes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from maskmoe.run_report.history import History

_PATTERN = "events.out.tfevents.*"
# Megatron logs most scalars twice; the x axis of a tag with this end is the number of samples.
_SAMPLES = " vs samples"
_TEXT = "/text_summary"
_LOSS = "lm loss"

CLOCK_TIME = "clock time of an iteration"
"""The tag of the seconds between the records of two iterations, which include evaluation and saving."""


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
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._loaders: dict[Path, Any] = {}

    def read_new(self) -> Iterator[tuple[Path, Scalar | Text]]:
        """Yield what was written since the last call, with the file. An incomplete last record is left to the next.

        Raises:
            OSError: a file cannot be read.
        """
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto import event_pb2

        for path in event_files(self._folder):
            if path not in self._loaders:
                self._loaders[path] = RawEventFileLoader(str(path))
            for record in self._loaders[path].Load():
                event = event_pb2.Event.FromString(record)  # pyrefly: ignore[missing-attribute]
                for value in event.summary.value:
                    if value.HasField("simple_value") and not value.tag.endswith(_SAMPLES):
                        yield path, Scalar(value.tag, event.step, value.simple_value, event.wall_time)
                    elif value.tag.endswith(_TEXT):
                        text = value.tensor.string_val[0].decode(errors="replace")
                        yield path, Text(value.tag.removesuffix(_TEXT), text)


class EventHistory:
    """A history that grows with the event files of a run.

    Args:
        folder: the folder of the event files.

    Attributes:
        history: what the calls of `update` have read.
    """

    def __init__(self, folder: Path) -> None:
        self.history = History()
        self._events = EventFolder(folder)
        self._file: Path | None = None
        self._newest_loss: Scalar | None = None

    def update(self) -> History:
        """Read what is new, and return the history."""
        for path, event in self._events.read_new():
            if isinstance(event, Text):
                self.history.texts[event.tag] = event.text
                continue
            if path != self._file:
                self.history.start(event.step)
                self._file, self._newest_loss = path, None
            self.history.append(event.tag, event.step, event.value)
            self.history.newest = event.seconds
            if event.tag == _LOSS:
                self._measure_time(event)
        return self.history

    def _measure_time(self, loss: Scalar) -> None:
        before, self._newest_loss = self._newest_loss, loss
        if before is not None and loss.step > before.step:
            self.history.append(CLOCK_TIME, loss.step, (loss.seconds - before.seconds) / (loss.step - before.step))


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, in the order in which they were begun; the folder need not exist."""
    return sorted(folder.glob(_PATTERN))
