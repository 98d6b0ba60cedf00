"""Read losses and speed from the log that Megatron's training prints."""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

_RANK = r"^(?:\[rank\d+\]: )?"
_ITERATION = re.compile(
    _RANK + r" \[[^]]+\] iteration +(?P<iteration>\d+)/ *(?P<total>\d+) \|"
    r".* elapsed time per iteration \(ms\): (?P<milliseconds>[\d.]+) \|"
    r".* global batch size: +(?P<batch>\d+) \|"
    r"(?:.* lm loss: (?P<loss>\S+) \|)?"
)
_VALIDATION = re.compile(
    _RANK + r" *validation loss at iteration (?P<iteration>\d+)(?: on validation set)? *\|"
    r" lm loss value: (?P<loss>\S+) \|"
)


@dataclass(frozen=True)
class IterationRecord:
    """One line of Megatron's training log. The line covers all iterations since the line before.

    Attributes:
        iteration: the newest iteration, counted from 1.
        total: iterations of the whole run.
        seconds: mean duration of an iteration.
        batch: samples in an iteration.
        loss: mean loss in nats per token; None if the loss is not a finite number.
    """

    iteration: int
    total: int
    seconds: float
    batch: int
    loss: float | None


@dataclass(frozen=True)
class ValidationRecord:
    """The loss of held-out text after an iteration, in nats per token."""

    iteration: int
    loss: float


def parse_line(line: str) -> IterationRecord | ValidationRecord | None:
    """Return what a line of Megatron's log says about losses; None for any other line."""
    if match := _ITERATION.match(line):
        loss = float(match["loss"] or "nan")
        return IterationRecord(
            iteration=int(match["iteration"]),
            total=int(match["total"]),
            seconds=float(match["milliseconds"]) / 1000,
            batch=int(match["batch"]),
            loss=loss if math.isfinite(loss) else None,
        )
    if match := _VALIDATION.match(line):
        return ValidationRecord(int(match["iteration"]), float(match["loss"]))
    return None


class TrainingHistory:
    """The losses of a run over all its starts. A repeated iteration replaces the earlier record of the iteration.

    Args:
        lines: lines of the logs, in the order in which they were written.

    Attributes:
        iterations: records of training by iteration.
        validations: records of held-out losses by iteration.
    """

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self.iterations: dict[int, IterationRecord] = {}
        self.validations: dict[int, ValidationRecord] = {}
        for record in map(parse_line, lines):
            if isinstance(record, IterationRecord):
                self.iterations[record.iteration] = record
            elif isinstance(record, ValidationRecord):
                self.validations[record.iteration] = record

    @property
    def training_seconds(self) -> float:
        """Duration of all iterations. A repeated iteration counts once."""
        pairs = itertools.pairwise([0, *sorted(self.iterations)])
        return sum((number - before) * self.iterations[number].seconds for before, number in pairs)
