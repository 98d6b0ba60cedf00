"""Reads TensorBoard's event files, again and again while a run writes them."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from maskmoe.files.untrusted import UnusableFile, check_regular
from maskmoe.run_report.history import History

_PATTERN = "events.out.tfevents.*"
# Megatron logs most scalars twice; the x axis of a tag with this end is the number of samples.
_SAMPLES = " vs samples"
_TEXT = "/text_summary"
_LOSS = "lm loss"
_VALIDATION = " validation"
_FRAME_BYTES = 16  # of a record beside its content: length and checksums

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


class EventFile:
    """The part of an event file that was not read yet.

    Args:
        path: the file.
        is_wanted: decides by the tag of a scalar whether its values are read.

    Attributes:
        num_read: number of bytes that were read.
    """

    def __init__(self, path: Path, is_wanted: Callable[[str], bool]) -> None:
        self.num_read = 0
        self._path = path
        self._is_wanted = is_wanted
        self._loader: Any = None

    def read_new(self) -> Iterator[Scalar | Text]:
        """Yield what was written since the last call.

        An incomplete last record is left to the next call. A damaged file ends before the damage.

        Raises:
            UnusableFile: the file is gone, cannot be read, or is not a regular file.
        """
        from google.protobuf.message import DecodeError
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto import event_pb2

        check_regular(self._path)
        try:
            if self._loader is None:
                self._loader = RawEventFileLoader(str(self._path))
            for record in self._loader.Load():
                self.num_read += len(record) + _FRAME_BYTES
                with suppress(DecodeError):
                    yield from self._values(event_pb2.Event.FromString(record))  # pyrefly: ignore[missing-attribute]
        except OSError as error:
            raise UnusableFile(self._path, f"cannot be read: {error.strerror}") from error

    def _values(self, event: Any) -> Iterator[Scalar | Text]:
        for value in event.summary.value:
            if value.HasField("simple_value"):
                if self._is_wanted(value.tag):
                    yield Scalar(value.tag, event.step, value.simple_value, event.wall_time)
            elif value.tag.endswith(_TEXT) and value.tensor.string_val:
                yield Text(value.tag.removesuffix(_TEXT), value.tensor.string_val[0].decode(errors="replace"))


class EventFolder:
    """The event files of a run in the order of its starts. Each start of the run writes one file.

    Args:
        folder: the folder in `--tensorboard-dir`. It may not exist yet.
        is_wanted: decides by the tag of a scalar whether its values are read.
    """

    def __init__(self, folder: Path, is_wanted: Callable[[str], bool] = is_over_iterations) -> None:
        self._folder, self._is_wanted = folder, is_wanted
        self._files: dict[Path, EventFile] = {}

    def read_new(self) -> Iterator[tuple[Path, Scalar | Text]]:
        """Yield what was written since the last call, with the file. A file that cannot be read is skipped."""
        for path in event_files(self._folder):
            file = self._files.setdefault(path, EventFile(path, self._is_wanted))
            with suppress(UnusableFile):
                for event in file.read_new():
                    yield path, event

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
        self._newest_loss: Scalar | None = None

    def update(self) -> History:
        """Read what is new, and return the history."""
        for path, event in self.events.read_new():
            if isinstance(event, Text):
                self.history.texts[event.tag] = event.text
                continue
            if path != self._file:
                self.history.start(event.step, event.seconds)
                self._file, self._newest_loss = path, None
            self.history.newest = event.seconds
            if self._is_of_test_set(event):
                continue
            self.history.append(event.tag, event.step, event.value)
            if event.tag == _LOSS:
                self._measure_time(event)
        return self.history

    def _is_of_test_set(self, event: Scalar) -> bool:
        """Return whether a value is of the test set, which Megatron logs after the validation set by the same tag."""
        series = self.history.series.get(event.tag)
        return _VALIDATION in event.tag and series is not None and (series.newest or (None,))[0] == event.step

    def _measure_time(self, loss: Scalar) -> None:
        before, self._newest_loss = self._newest_loss, loss
        # The clock may be set back between two records.
        if before is not None and loss.step > before.step and loss.seconds > before.seconds:
            self.history.append(CLOCK_TIME, loss.step, (loss.seconds - before.seconds) / (loss.step - before.step))


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, in the order in which they were begun; the folder need not exist."""
    return sorted(folder.glob(_PATTERN))
