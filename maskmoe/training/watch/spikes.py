"""Finds training steps that are off, and reports them."""

from argparse import Namespace
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from megatron.training import is_last_rank

from maskmoe.processes.console import console
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.progress import LOSS
from maskmoe.training.watch.writers import log_scalars

_DEVIATIONS_PER_MAD = 1.4826  # standard deviation of a normal distribution / its median absolute deviation
# The smallest robust deviation, because a flat curve must not fire: a share of the median, or this if the median is 0.
_FLOOR = 0.005
_ABSOLUTE_FLOOR = 1e-6

_TAGS = {"loss": "spike/loss", "gradient norm": "spike/grad-norm"}


class SpikeWatch(Callback):
    """Reports a step whose loss or gradient norm is far from the values of the steps before, on the last rank.

    With fewer than half of `--spike-window` values, nothing is judged. A step that is off enters the window like any
    other step. So a lasting change of the level is the new normal after half a window. Checkpoints hold the window.
    """

    def __init__(self, args: Namespace) -> None:
        self._limit = args.spike_deviations
        self._least = max(2, args.spike_window // 2)
        self._windows = {name: deque[float](maxlen=args.spike_window) for name in _TAGS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps before the checkpoint."""
        for name, values in state["history"].items():
            self._windows[name].extend(values)

    def after_step(self, step: Step) -> None:
        """Judge a finished step; a step without an update has no result to judge."""
        if not is_last_rank() or not step.has_updated:
            return
        lines, scalars = [], {}
        # Megatron waits for the device in each step, for the norm and for the loss scale. The loss is ready then.
        for name, value in (("loss", float(step.losses[LOSS])), ("gradient norm", step.grad_norm)):
            before = self._windows[name]
            if value is None:
                continue
            deviations = robust_deviations(value, before) if len(before) >= self._least else 0.0
            if abs(deviations) > self._limit:
                side = "above" if deviations > 0 else "below"
                distance = f"{abs(deviations):.1f} robust deviations {side} the median {median(before):.4g}"
                lines.append(f"{name} {value:.4g}, {distance}")
                scalars[_TAGS[name]] = deviations
            before.append(value)
        if lines:
            console.say(f"warning: iteration {step.iteration} is off: {'; '.join(lines)}", rank=-1)
            log_scalars(scalars, step.iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the values of the steps so far, which the last rank has; a collective call."""
        shared = [{name: list(values) for name, values in self._windows.items()}]
        torch.distributed.broadcast_object_list(shared, torch.distributed.get_world_size() - 1)
        return {"history": shared[0]}


def robust_deviations(value: float, before: Sequence[float]) -> float:
    """Return the signed distance of a value from the median of the values before, in robust deviations.

    A robust deviation is the median absolute deviation in standard deviations of a normal distribution, with a floor.
    """
    middle = median(before)
    spread = _DEVIATIONS_PER_MAD * median(abs(other - middle) for other in before)
    return (value - middle) / max(spread, _FLOOR * abs(middle), _ABSOLUTE_FLOOR)
