"""Judges every training step, reports a step that is off, and skips its update or goes back, as `--spike-action` says.

The last rank, which logs, judges the steps. If a step may be skipped or the run may go back, all ranks judge the same
two numbers of the last rank, and so come to the same decision in every layout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from megatron.core import mpu
from megatron.training import get_tensorboard_writer, get_wandb_writer, is_last_rank
from torch import Tensor

from maskmoe.megatron_compat.globals import get_args
from maskmoe.processes.interruption import EXIT_REWIND
from maskmoe.training.loop.megatron_patches import gate_updates
from maskmoe.training.resume.rewinding import Rewinder
from maskmoe.training.watch.run_warnings import RunWarnings
from maskmoe.training.watch.spikes import Deviation, SpikeDetector

_LOSS = "lm loss"
_NO_NORM = -1.0
_TAGS = {"loss": "spike/loss", "gradient norm": "spike/grad-norm"}


class SpikeWatch:
    """Watches the steps of a run, see `watch_steps` and `--spike-action`.

    Args:
        action: Whether to `report` steps that are off, or also to `skip` their update or to `rewind` the run.
        detector: Judges the steps.
        warnings: Takes the reports.
        rewinder: Prepares the run to go back; used by the action `rewind` only.
    """

    def __init__(self, action: str, detector: SpikeDetector, warnings: RunWarnings, rewinder: Rewinder) -> None:
        self._action = action
        self._detector = detector
        self._warnings = warnings
        self._rewinder = rewinder
        self._is_gated = False
        self._losses: list[dict[str, Tensor]] = []

    def wrap(self, train_step: Callable[..., tuple]) -> Callable[..., tuple]:
        """Return a function like Megatron's `train_step` that also watches the step."""

        @wraps(train_step)
        def watched(
            forward_step: Any,
            data_iterator: Any,
            model: Any,
            optimizer: Any,
            scheduler: Any,
            config: Any,
            forward_backward: Callable[..., list[dict[str, Tensor]]],
            *args: Any,
            **options: Any,
        ) -> tuple:
            if self._action == "skip":
                if not self._is_gated:
                    self._is_gated = True
                    gate_updates(optimizer, self._allows_update)
                forward_backward = self._keeping_losses(forward_backward)
            results = train_step(
                forward_step, data_iterator, model, optimizer, scheduler, config, forward_backward, *args, **options
            )
            return results if self._action == "skip" else self._after_step(results)

        return watched

    @contextmanager
    def sharing_history(self) -> Iterator[None]:
        """Save the steps so far with the arguments of the checkpoint that the block saves; a collective call."""
        get_args().spike_history = _broadcast(self._detector.history)
        yield

    def _after_step(self, results: tuple) -> tuple:
        """Judge a finished step; return its results, with which the run ends if it goes back."""
        losses, is_skipped, _, should_exit, _, grad_norm, *others = results
        # Megatron ends the run for a fault, or skipped the update because the loss scale of fp16 was too large.
        if should_exit or is_skipped:
            return results
        if self._action == "report" and not is_last_rank():
            return results
        # Megatron waits for the device in each step, for the norm and for the loss scale. The loss is ready then, too.
        loss = float(losses[_LOSS]) if is_last_rank() else 0.0
        norm = None if grad_norm is None else float(grad_norm)
        if self._action == "report":
            self._report(self._detector.judge(loss, norm))
            return results
        deviations = self._judge_on_all_ranks(loss, norm)
        going_back = ""
        is_above = any(deviation.deviations > 0 for deviation in deviations)
        if is_above:
            going_back = self._rewinder.prepare(get_args().curr_iteration + 1, _describe(deviations))
        self._report(deviations, going_back)
        if is_above and self._rewinder.is_prepared:
            return losses, is_skipped, False, True, EXIT_REWIND, grad_norm, *others
        return results

    def _allows_update(self, grad_norm: float) -> bool:
        """Return whether the step in progress is not off, and report the step if it is; a collective call."""
        deviations = self._judge_on_all_ranks(_mean_loss(self._losses), grad_norm)
        is_skipped = any(deviation.deviations > 0 for deviation in deviations)
        self._report(deviations, "the update is skipped" if is_skipped else "")
        return not is_skipped

    def _keeping_losses(self, forward_backward: Callable[..., list]) -> Callable[..., list]:
        """Return a function like Megatron's schedule that also keeps the losses of the micro-batches."""

        def keep_losses(*args: Any, **options: Any) -> list:
            self._losses = forward_backward(*args, **options)
            return self._losses

        return keep_losses

    def _judge_on_all_ranks(self, loss: float, grad_norm: float | None) -> list[Deviation]:
        """Judge the values of the last rank; a collective call with the same result on all ranks."""
        values = torch.tensor(
            [loss, _NO_NORM if grad_norm is None else grad_norm],
            dtype=torch.float64,
            device=torch.cuda.current_device(),
        )
        torch.distributed.broadcast(values, torch.distributed.get_world_size() - 1)
        loss, norm = values.tolist()
        return self._detector.judge(loss, None if norm == _NO_NORM else norm)

    def _report(self, deviations: list[Deviation], action: str = "") -> None:
        """Report a step on the last rank if the step is off.

        Args:
            deviations: The values of the step that are off.
            action: A clause that says what the run does about the step; empty if it does nothing.
        """
        if not deviations or not is_last_rank():
            return
        iteration = get_args().curr_iteration + 1
        text = f"iteration {iteration} is off: {_describe(deviations)}" + (f"; {action}" if action else "")
        facts = {name.replace(" ", "_"): value for name, value in _values(deviations).items()}
        self._warnings.warn(text, iteration, **facts)
        scalars = {_TAGS[deviation.name]: deviation.deviations for deviation in deviations}
        if writer := get_tensorboard_writer():
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, iteration)
        if wandb_writer := get_wandb_writer():
            wandb_writer.log(scalars, iteration)


def _describe(deviations: list[Deviation]) -> str:
    return "; ".join(map(str, deviations))


def _values(deviations: list[Deviation]) -> dict[str, float]:
    return {deviation.name: deviation.value for deviation in deviations}


def _mean_loss(losses: list[dict[str, Tensor]]) -> float:
    """Return the loss of a step as Megatron logs it on the last pipeline stage; 0 on other stages; a collective call.

    Args:
        losses: For each micro-batch of this rank, the sum of the losses and the number of tokens, [2].
    """
    if not losses:
        return 0.0
    total = torch.stack([loss[_LOSS] for loss in losses]).sum(dim=0)
    torch.distributed.all_reduce(total, group=mpu.get_data_parallel_group(with_context_parallel=True))
    return float(total[0] / total[1])


def _broadcast(history: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the history of the last rank; a collective call."""
    shared = [history]
    torch.distributed.broadcast_object_list(shared, torch.distributed.get_world_size() - 1)
    return shared[0]
