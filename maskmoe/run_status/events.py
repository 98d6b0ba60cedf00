"""Reads the scalars and texts that a run has logged to TensorBoard, over all starts of the run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from maskmoe.files.run_folder import TENSORBOARD, TEXT_TAG

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

_PATTERN = "events.out.tfevents.*"
_TEXT = "/text_summary"
# Megatron logs most scalars twice; the x axis of a tag with this end is the number of samples.
_OVER_SAMPLES = " vs samples"


@dataclass(frozen=True)
class Logged:
    """The scalars and texts that a run has logged.

    Attributes:
        scalars: The values of each tag, ordered by iteration. Iterations that a resumed run repeats have the newest
            value.
        texts: MaskMoE's own texts by name.
        newest: Time of the newest value in seconds since 1970; None if nothing is logged.
        newest_start: Time of the first value of the newest start.
    """

    scalars: Mapping[str, Sequence["ScalarEvent"]] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    newest: float | None = None
    newest_start: float | None = None

    def last(self, tag: str) -> "ScalarEvent | None":
        """Return the newest value of a scalar; None if the run has not logged the scalar."""
        values = self.scalars.get(tag)
        return values[-1] if values else None


def event_files(folder: Path) -> list[Path]:
    """Return the event files in a folder, which need not exist, in the order in which they were begun."""
    return sorted(path for path in folder.glob(_PATTERN) if path.is_file())


def find_event_folder(run: Path, tensorboard_dir: Path | None) -> Path | None:
    """Return the folder of a run's event files: in the run folder, or the run's `--tensorboard-dir`; None if none.

    If both have event files, the folder with the newest file is that of the newest start.
    """
    places = (run / TENSORBOARD, run, tensorboard_dir)
    newest_files = {place: files[-1].name for place in places if place is not None and (files := event_files(place))}
    if not newest_files:
        return None
    first, newest = next(iter(newest_files)), max(newest_files, key=newest_files.__getitem__)
    # The arguments of a copied run name the folder of the original, which has the copy's files and maybe newer ones.
    is_original = (newest / newest_files[first]).exists()
    return first if is_original else newest


def read_events(folder: Path | None, most_values: int = 0) -> Logged:
    """Return what the event files in a folder hold. A damaged file is read up to the damage.

    Args:
        folder: The folder; None if the run has none.
        most_values: The most values of a scalar in one file. TensorBoard chooses them at random, and always keeps the
            newest. 0 reads all values.
    """
    scalars: dict[str, dict[int, ScalarEvent]] = {}
    texts: dict[str, str] = {}
    newest = newest_start = None
    # Each start of a run writes a file of its own.
    for path in [] if folder is None else event_files(folder):
        accumulator = _read_file(path, most_values)
        tags = [tag for tag in accumulator.scalars.Keys() if not tag.endswith(_OVER_SAMPLES)]
        logged = {tag: accumulator.Scalars(tag) for tag in tags}
        for tag in accumulator.tensors.Keys():
            if tag.startswith(TEXT_TAG):
                content = accumulator.Tensors(tag)[-1].tensor_proto.string_val
                texts[tag.removeprefix(TEXT_TAG).removesuffix(_TEXT)] = b"".join(content).decode(errors="replace")
        if not logged:
            continue
        # A start abandons the iterations that an earlier start has trained beyond the loaded checkpoint.
        first = min(value.step for values in logged.values() for value in values)
        scalars = {
            tag: {step: value for step, value in values.items() if step < first} for tag, values in scalars.items()
        }
        for tag, values in logged.items():
            for value in values:
                # Megatron logs the loss of the test set after that of the validation set, with the same tag and step.
                scalars.setdefault(tag, {}).setdefault(value.step, value)
        times = [value.wall_time for values in logged.values() for value in values]
        newest_start, newest = min(times), max(times)
    ordered = {tag: [values[step] for step in sorted(values)] for tag, values in scalars.items() if values}
    return Logged(ordered, texts, newest, newest_start)


def _read_file(path: Path, most_values: int) -> "EventAccumulator":
    """Return the content of an event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"scalars": most_values, "tensors": 1})
    with suppress(Exception):  # damaged bytes raise exceptions of any class, and what precedes them is kept
        accumulator.Reload()
    return accumulator
