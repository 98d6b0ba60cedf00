"""Measures how far a run is, and how fast."""

from dataclasses import dataclass
from typing import Self

from maskmoe.files.run_folder import Fact
from maskmoe.run_status.arguments import RunArguments
from maskmoe.run_status.scalars import Logged

LOSS, HELD_OUT_LOSS = "lm loss", "lm loss validation"
"""Megatron's tags of the losses of training and of held-out text."""

_RECENT = 100  # values from which the speed is measured


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
    def of(cls, logged: Logged, printed_loss: Fact | None, arguments: RunArguments) -> Self:
        """Measure a run.

        Args:
            logged: the scalars of the run.
            printed_loss: the last loss that the run has printed before its end; None if the run has no end. The loss is
                preferred to the logged one, which with a `--log-interval` above 1 is that of a single iteration, while
                Megatron prints the mean over the interval.
            arguments: the arguments of the run.
        """
        loss, held_out = logged.last(LOSS), logged.last(HELD_OUT_LOSS)
        batch, seq_length = logged.last("batch-size"), arguments.number("seq_length")
        seconds, speed = _seconds_per_iteration(logged), None
        if batch is not None and seq_length is not None and seconds is not None:
            speed = batch.value * seq_length / seconds
        logged_loss = None if loss is None else loss.value
        return cls(
            iteration=None if loss is None else loss.step,
            total=arguments.number("train_iters"),
            loss=printed_loss if isinstance(printed_loss, float) else logged_loss,
            held_out_iteration=None if held_out is None else held_out.step,
            held_out_loss=None if held_out is None else held_out.value,
            tokens_per_second=speed,
            seconds_per_iteration=seconds,
        )

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
