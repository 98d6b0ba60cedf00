"""Reads the scalars that a run has logged to TensorBoard, over all starts of the run."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import ScalarEvent

# Megatron logs most scalars twice; the x axis of a tag with this end is the number of samples.
_OVER_SAMPLES = " vs samples"


def read_scalars(folder: Path) -> Mapping[str, Sequence["ScalarEvent"]]:
    """Return the values of each tag in a folder's event files, by iteration; an absent folder has none.

    Iterations that a resumed run repeats have the newest value. A damaged file is read up to the damage.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars: dict[str, dict[int, ScalarEvent]] = {}
    # Each start of a run writes its own file. The names begin with the time of the start.
    for path in sorted(folder.glob("events.out.tfevents.*")):
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
        with suppress(Exception):  # damaged bytes raise exceptions of any class, and what precedes them is kept
            accumulator.Reload()
        tags = [tag for tag in accumulator.scalars.Keys() if not tag.endswith(_OVER_SAMPLES)]
        logged = {tag: accumulator.Scalars(tag) for tag in tags}
        # A start abandons the iterations that an earlier start has trained beyond the loaded checkpoint.
        first = min((value.step for values in logged.values() for value in values), default=None)
        if first is None:
            continue
        for values in scalars.values():
            for step in [step for step in values if step >= first]:
                del values[step]
        for tag, events in logged.items():
            for event in events:
                # Megatron logs the loss of the test set after that of the validation set, with the same tag and step.
                scalars.setdefault(tag, {}).setdefault(event.step, event)
    return {tag: [values[step] for step in sorted(values)] for tag, values in scalars.items() if values}
