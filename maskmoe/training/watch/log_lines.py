"""Reads losses from the lines that Megatron's training prints."""

import math
import re
from dataclasses import dataclass

_ITERATION = re.compile(r" \[[^]]+\] iteration +\d+/ *\d+ \|(?:.* lm loss: (?P<loss>\S+) \|)?")
_VALIDATION = re.compile(
    r" *validation loss at iteration \d+ (?:on validation set )?\| lm loss value: (?P<loss>\S+) \|"
)


@dataclass(frozen=True)
class LoggedLoss:
    """A loss that Megatron has printed.

    Attributes:
        is_validation: whether the loss is that of held-out text.
        loss: nats per token; None if the line has no finite loss.
    """

    is_validation: bool
    loss: float | None


def parse_line(line: str) -> LoggedLoss | None:
    """Return the loss that a line of Megatron's log prints; None for any other line."""
    match, is_validation = _ITERATION.match(line), False
    if match is None:
        match, is_validation = _VALIDATION.match(line), True
    if match is None:
        return None
    loss = float(match["loss"] or "nan")
    return LoggedLoss(is_validation, loss if math.isfinite(loss) else None)
