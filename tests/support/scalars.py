"""TensorBoard's event files, as a training leaves them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


def write_scalars(
    folder: Path, scalars: Mapping[str, Sequence[tuple[int, float]]], start: float = 0.0, seconds: float = 1.0
) -> None:
    """Write a file of scalars.

    Args:
        folder: Folder of event files, which is made.
        scalars: Steps and values by tag.
        start: Wall time before the first step.
        seconds: Duration of a step.
    """
    writer = EventFileWriter(str(folder))
    for tag, points in scalars.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, summary=summary, wall_time=start + step * seconds))
    writer.close()
