"""Measures how far a run is, and how fast."""

import math
from dataclasses import dataclass
from typing import Self

from maskmoe.launch.journal import Fact
from maskmoe.run_status.arguments import RunArguments
from maskmoe.run_status.logs import NewestLines
from maskmoe.run_status.scalars import Logged

LOSS, HELD_OUT_LOSS = "lm loss", "lm loss validation"
"""Megatron's tags of the losses of training and of held-out text."""

_RECENT = 100  # values from which the speed is measured
_SECONDS_OF_CLOCKS = 1.0  # the clocks of two hosts may differ so much


@dataclass(frozen=True)
class Progress:
    """How far a run is; what is unknown is None.

    Attributes:
        iteration: the newest iteration.
        total: the iterations of the whole run.
        loss: the newest loss in nats per token; it may be NaN.
        held_out_iteration: the newest iteration with a loss of held-out text.
        held_out_loss: this loss in nats per token.
        tokens_per_second: the speed of all ranks together over the newest iterations, with evaluation and saving.
        seconds_per_iteration: mean time between the newest iterations, with evaluation and saving.
    """

    iteration: int | None = None
    total: int | None = None
    loss: float | None = None
    held_out_iteration: int | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_per_iteration: float | None = None

    @classmethod
    def of(cls, logged: Logged, lines: NewestLines, end_loss: Fact | None, arguments: RunArguments) -> Self:
        """Measure a run.

        A loss that the run has printed is preferred to the logged one: with a `--log-interval` above 1, Megatron prints
        the mean over the interval, and logs the loss of the last iteration.

        Args:
            logged: the scalars of the run.
            lines: what the run has printed into its logs.
            end_loss: the last loss that the run has printed before its end, from the journal; None if it is unknown.
            arguments: the arguments of the run.
        """
        total = arguments.number("train_iters")
        loss, held_out = (
            (None, None) if value is None else (value.step, value.value)
            for value in (logged.last(LOSS), logged.last(HELD_OUT_LOSS))
        )
        iteration = loss[0]
        # Logs that are older than the newest event file are those of an earlier start.
        if lines.changed is not None and lines.changed >= (logged.newest or 0) - _SECONDS_OF_CLOCKS:
            if (record := lines.iteration) is not None:
                loss = record.iteration, math.nan if record.loss is None else record.loss
                iteration, total = max(iteration or 0, record.iteration), total or record.total
            if lines.validation is not None:
                held_out = lines.validation.iteration, lines.validation.loss
        if isinstance(end_loss, float):
            loss = iteration, end_loss
        seconds = _seconds_per_iteration(logged)
        batch, seq_length = logged.last("batch-size"), arguments.number("seq_length")
        tokens = None if batch is None or seq_length is None else batch.value * seq_length
        speed = None if tokens is None or seconds is None else tokens / seconds
        return cls(iteration, total, loss[1], *held_out, speed, seconds)

    @property
    def is_complete(self) -> bool:
        """Whether the run has trained all iterations."""
        return self.iteration is not None and self.total is not None and self.iteration >= self.total

    @property
    def seconds_left(self) -> float | None:
        """The time that the remaining iterations need, with evaluation and saving; None if it is unknown."""
        if self.iteration is None or self.total is None or self.seconds_per_iteration is None:
            return None
        return max(0, self.total - self.iteration) * self.seconds_per_iteration


def _seconds_per_iteration(logged: Logged) -> float | None:
    """Return the mean time between the newest iterations; None if it is unknown, or if the clock was set back."""
    recent = [value for value in logged.scalars.get(LOSS, ()) if value.wall_time >= (logged.newest_start or 0)]
    if len(recent := recent[-_RECENT:]) < 2 or recent[-1].wall_time <= recent[0].wall_time:
        return None
    return (recent[-1].wall_time - recent[0].wall_time) / (recent[-1].step - recent[0].step)
