"""Finds training steps that are off, and reports them."""

import math
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from megatron.training import is_last_rank

from maskmoe.processes.console import console
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.progress import LOSS
from maskmoe.training.watch.writers import log_scalars

_DEVIATIONS_PER_MAD = 1.4826
"""The standard deviation of a normal distribution, divided by its median absolute deviation."""

_FLOOR = 0.005
"""The smallest robust deviation, as a share of the median: a flat curve must not fire."""

_ABSOLUTE_FLOOR = 1e-6
"""The smallest robust deviation of values whose median is 0."""


@dataclass(frozen=True)
class Deviation:
    """A loss or gradient norm that is too far from the values of the steps before.

    Attributes:
        median: The median of the values before; NaN without such values.
        deviations: The signed distance from the median in robust deviations, infinite for a value that is not finite.
    """

    name: str
    value: float
    median: float
    deviations: float

    def __str__(self) -> str:
        if not math.isfinite(self.deviations):
            return f"{self.name} {self.value:.4g}"
        side = "above" if self.deviations > 0 else "below"
        distance = f"{abs(self.deviations):.1f} robust deviations {side} the median {self.median:.4g}"
        return f"{self.name} {self.value:.4g}, {distance}"


class SpikeDetector:
    """Judges the loss and the gradient norm of each step by the steps before.

    The robust deviation is the median absolute deviation, scaled to the standard deviation of a normal distribution,
    with a floor. With fewer than half of `window` values, nothing is judged. A step that is off enters the windows,
    too. So a lasting change of the level is the new normal after half a window.

    Args:
        window: The number of steps before with which a step is compared.
        limit: The number of robust deviations beyond which a value is off.
    """

    NAMES = ("loss", "gradient norm")

    def __init__(self, window: int, limit: float) -> None:
        self._limit = limit
        self._least = max(2, window // 2)
        self._windows = {name: deque[float](maxlen=window) for name in self.NAMES}

    @property
    def history(self) -> dict[str, list[float]]:
        """The values of the last steps, by name."""
        return {name: list(values) for name, values in self._windows.items()}

    def load(self, history: Mapping[str, Sequence[float]]) -> None:
        """Take the `history` of an earlier detector, whose steps came right before."""
        for name, values in history.items():
            self._windows[name].extend(values)

    def judge(self, loss: float, grad_norm: float | None) -> list[Deviation]:
        """Return the values of a step that are off, and take the step into the windows; a norm may be None.

        A value that is NaN or infinite is off, and does not enter its window.
        """
        found = []
        for (name, before), value in zip(self._windows.items(), (loss, grad_norm), strict=True):
            if value is None:
                continue
            middle = median(before) if before else math.nan
            if not math.isfinite(value):
                found.append(Deviation(name, value, middle, math.inf))
                continue
            if len(before) >= self._least:
                spread = _DEVIATIONS_PER_MAD * median(abs(other - middle) for other in before)
                deviations = (value - middle) / max(spread, _FLOOR * abs(middle), _ABSOLUTE_FLOOR)
                if abs(deviations) > self._limit:
                    found.append(Deviation(name, value, middle, deviations))
            before.append(value)
        return found


_TAGS = {"loss": "spike/loss", "gradient norm": "spike/grad-norm"}


class SpikeWatch(Callback):
    """Watches the loss and the gradient norm of each step on the last rank, and reports a step that is off."""

    def __init__(self, args: Namespace) -> None:
        self._detector = SpikeDetector(args.spike_window, args.spike_deviations)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps before the checkpoint."""
        self._detector.load(state["history"])

    def after_step(self, step: Step) -> None:
        """Judge a finished step; a step without an update has no result to judge."""
        if not is_last_rank() or not step.has_updated:
            return
        # Megatron waits for the device in each step, for the norm and for the loss scale. The loss is ready then.
        deviations = self._detector.judge(float(step.losses[LOSS]), step.grad_norm)
        if deviations:
            text = "; ".join(map(str, deviations))
            console.say(f"warning: iteration {step.iteration} is off: {text}", rank=-1)
            scalars = {_TAGS[deviation.name]: deviation.deviations for deviation in deviations}
            log_scalars(scalars, step.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the steps so far, which the last rank has; a collective call."""
        shared = [self._detector.history]
        torch.distributed.broadcast_object_list(shared, torch.distributed.get_world_size() - 1)
        return {"history": shared[0]}
