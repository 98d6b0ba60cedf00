"""Finds training steps that are off, reports them, and skips their updates if wanted."""

import math
from argparse import Namespace
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from megatron.core import mpu
from megatron.training import is_last_rank
from torch import Tensor

from maskmoe.checkpoint.integrity import read_common_state
from maskmoe.files.run_folder import Journal
from maskmoe.megatron_compat.globals import get_args
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.writers import log_scalars, warn

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
        history: The `history` of an earlier detector, whose steps came right before.
    """

    NAMES = ("loss", "gradient norm")

    def __init__(self, window: int, limit: float, history: Mapping[str, Sequence[float]] | None = None) -> None:
        self._limit = limit
        self._least = max(2, window // 2)
        self._windows = {name: deque((history or {}).get(name, ()), maxlen=window) for name in self.NAMES}

    @property
    def history(self) -> dict[str, list[float]]:
        """The values of the last steps, by name."""
        return {name: list(values) for name, values in self._windows.items()}

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


_LOSS = "lm loss"
_TAGS = {"loss": "spike/loss", "gradient norm": "spike/grad-norm"}


class SpikeWatch(Callback):
    """Watches the loss and the gradient norm of each step, and reports to the journal, see `--spike-action`.

    Attributes:
        skips: Whether Megatron must ask `allows_update` before each update.
    """

    def __init__(self, args: Namespace, journal: Journal) -> None:
        self._journal = journal
        self.skips = args.spike_action == "skip"
        self._detector = SpikeDetector(args.spike_window, args.spike_deviations, _saved_history(args))

    def after_step(self, step: Step) -> None:
        """Judge a finished step on the last rank, unless it was judged before its update."""
        # Steps without an update have no result to judge, or were skipped because the loss scale of fp16 was too large.
        if is_last_rank() and step.has_updated and not self.skips:
            # Megatron waits for the device in each step, for the norm and for the loss scale. The loss is ready then.
            self._report(self._detector.judge(float(step.losses[_LOSS]), step.grad_norm))

    def before_save(self) -> None:
        """Save the steps so far with the arguments of the checkpoint; a collective call."""
        shared = [self._detector.history]
        torch.distributed.broadcast_object_list(shared, torch.distributed.get_world_size() - 1)
        get_args().spike_history = shared[0]

    def allows_update(self, losses: list[dict[str, Tensor]], grad_norm: float) -> bool:
        """Judge the step in progress, and return whether to update the weights; a collective call of all ranks.

        A step with a value that is not finite is not skipped, because skipping would hide a fault that every later
        step may have. `FiniteStepCheck` ends the run after the update.
        """
        # All ranks judge the values of the last rank.
        values = torch.tensor([_mean_loss(losses), grad_norm], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(values, torch.distributed.get_world_size() - 1)
        deviations = self._detector.judge(*values.tolist())
        is_skipped = 0 < max((deviation.deviations for deviation in deviations), default=0) < math.inf
        if is_last_rank():
            self._report(deviations, "; the update is skipped" if is_skipped else "")
        return not is_skipped

    def _report(self, deviations: list[Deviation], action: str = "") -> None:
        """Report a step if it is off; `action` says what the run does about it, as the end of a sentence."""
        if not deviations:
            return
        iteration = get_args().curr_iteration + 1
        text = f"iteration {iteration} is off: {'; '.join(map(str, deviations))}{action}"
        facts = {deviation.name.replace(" ", "_"): deviation.value for deviation in deviations}
        warn(self._journal, text, iteration, **facts)
        log_scalars({_TAGS[deviation.name]: deviation.deviations for deviation in deviations}, iteration)


def _saved_history(args: Namespace) -> dict[str, list[float]] | None:
    """Return the losses and norms of the steps before the checkpoint to load; None if the checkpoint holds none."""
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None or args.finetune:
        return None
    return getattr(read_common_state(checkpoint).get("args"), "spike_history", None)


def _mean_loss(losses: list[dict[str, Tensor]]) -> float:
    """Return a step's loss on the last pipeline stage, as Megatron logs it, else 0; a collective call.

    `losses` has, for each micro-batch of this rank, the sum of the losses and the number of tokens, [2].
    """
    if not losses:
        return 0.0
    total = torch.stack([loss[_LOSS] for loss in losses]).sum(dim=0)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])
