"""Measures how far a run is, and how fast, from what the run has logged."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from maskmoe.run_report.events import CLOCK_TIME
from maskmoe.run_report.facts import Arguments
from maskmoe.run_report.history import Curve, History

LOSS, HELD_OUT_LOSS = "lm loss", "lm loss validation"
"""The tags of the losses of training and of held-out text."""

_RECENT = 100  # points of a curve


@dataclass(frozen=True)
class Progress:
    """How far a run is; what is unknown is None.

    Attributes:
        iteration: the newest iteration.
        total: the iterations of the whole run.
        loss: the loss of the newest iteration in nats per token; it may be NaN.
        held_out_iteration: the newest iteration with a loss of held-out text.
        held_out_loss: this loss in nats per token.
        tokens_per_second: median over the newest points, without evaluation and saving.
        tokens: tokens on which the run has trained.
        seconds_per_iteration: mean time between the newest iterations, which includes evaluation and saving.
    """

    iteration: int | None = None
    total: int | None = None
    loss: float | None = None
    held_out_iteration: int | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    tokens: float | None = None
    seconds_per_iteration: float | None = None

    @classmethod
    def of(cls, history: History, curves: Mapping[str, Curve]) -> Self:
        """Measure a run.

        Args:
            history: what the run has logged.
            curves: the curves of the history.
        """
        arguments = Arguments(history.texts)
        seq_length = arguments.number("seq_length")
        iteration, loss = _newest(history, LOSS)
        held_out_iteration, held_out_loss = _newest(history, HELD_OUT_LOSS)
        speed, batches = tokens_per_second(curves, seq_length), curves.get("batch-size")
        tokens = None
        if batches is not None and seq_length is not None:
            tokens = float(np.sum(np.diff(batches.steps, prepend=0) * batches.means)) * seq_length
        times = curves.get(CLOCK_TIME, curves.get("iteration-time"))
        return cls(
            iteration=iteration,
            total=arguments.number("train_iters"),
            loss=loss,
            held_out_iteration=held_out_iteration,
            held_out_loss=held_out_loss,
            # The first iteration is slow, as it includes preparations.
            tokens_per_second=None if speed is None else float(np.median(_recent(speed))),
            tokens=tokens,
            seconds_per_iteration=None if times is None else _finite(float(np.mean(_recent(times)))),
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


def tokens_per_second(curves: Mapping[str, Curve], seq_length: int | None) -> Curve | None:
    """Return the speed of all ranks together; None if it is unknown."""
    times, batches = curves.get("iteration-time", curves.get(CLOCK_TIME)), curves.get("batch-size")
    if times is None or batches is None or seq_length is None:
        return None
    batch = np.array([batches.value_at(step) or batches.means[-1] for step in times.steps])
    tokens = batch * seq_length  # [points], tokens of one iteration
    return Curve(times.steps, *(tokens / np.maximum(each, 1e-9) for each in (times.means, times.highs, times.lows)))


def _newest(history: History, tag: str) -> tuple[int | None, float | None]:
    """Return the newest iteration of a scalar, and its value."""
    series = history.series.get(tag)
    if series is None:
        return None, None
    if series.newest is not None:
        return series.newest
    curve = series.curve()  # the newest value was removed, because a later start has abandoned it
    return (int(curve.steps[-1]), float(curve.means[-1])) if len(curve) else (None, None)


def _finite(value: float) -> float | None:
    """Return a number; None for NaN and infinity, which damaged times give."""
    return value if math.isfinite(value) else None


def _recent(curve: Curve) -> np.ndarray:
    """Return the newest values of a curve, without the first value of the run, [values]."""
    return curve.means[1:][-_RECENT:] if len(curve) > 1 else curve.means
