"""Judges every training step, reports a step that is off, and skips its update if `--spike-action` says so.

The last rank, which logs, judges the steps. If a step may be skipped, all ranks judge the same two numbers of the last
rank, and so come to the same decision in every layout.
"""

from argparse import Namespace

import torch
from megatron.core import mpu
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training import is_last_rank
from torch import Tensor

from maskmoe.megatron_compat.globals import get_args
from maskmoe.training.loop.megatron_patches import ask_before_each_update
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.run_warnings import RunWarnings
from maskmoe.training.watch.scalars import log_scalars
from maskmoe.training.watch.spikes import Deviation, SpikeDetector

_LOSS = "lm loss"
_TAGS = {"loss": "spike/loss", "gradient norm": "spike/grad-norm"}


class SpikeWatch(Callback):
    """Watches the loss and the gradient norm of each step, see `--spike-action`.

    Args:
        args: Megatron's arguments.
        warnings: Takes the reports.
    """

    def __init__(self, args: Namespace, warnings: RunWarnings) -> None:
        self._warnings = warnings
        self._skips = args.spike_action == "skip"
        self._detector = SpikeDetector(args.spike_window, args.spike_deviations, _saved_history(args))

    def on_start(self) -> None:
        """Let Megatron ask before each update if updates may be skipped."""
        if self._skips:
            ask_before_each_update(self._allows_update)

    def after_step(self, step: Step) -> None:
        """Judge a finished step on the last rank, unless it was judged before its update."""
        # Steps without an update have no result to judge, or were skipped because the loss scale of fp16 was too large.
        if is_last_rank() and step.has_updated and not self._skips:
            # Megatron waits for the device in each step, for the norm and for the loss scale. The loss is ready then.
            self._report(self._detector.judge(float(step.losses[_LOSS]), step.grad_norm))

    def before_save(self) -> None:
        """Save the steps so far with the arguments of the checkpoint; a collective call."""
        shared = [self._detector.history]
        torch.distributed.broadcast_object_list(shared, torch.distributed.get_world_size() - 1)
        get_args().spike_history = shared[0]

    def _allows_update(self, losses: list[dict[str, Tensor]], grad_norm: float) -> bool:
        """Judge the step in progress, and return whether no value is too high; a collective call of all ranks."""
        # All ranks judge the values of the last rank.
        values = torch.tensor([_mean_loss(losses), grad_norm], dtype=torch.float64, device=torch.cuda.current_device())
        torch.distributed.broadcast(values, torch.distributed.get_world_size() - 1)
        deviations = self._detector.judge(*values.tolist())
        is_skipped = any(deviation.deviations > 0 for deviation in deviations)
        if is_last_rank():
            self._report(deviations, "; the update is skipped" if is_skipped else "")
        return not is_skipped

    def _report(self, deviations: list[Deviation], action: str = "") -> None:
        """Report a step if it is off.

        Args:
            deviations: The values of the step that are off.
            action: What the run does about the step, as the end of a sentence; empty if it does nothing.
        """
        if not deviations:
            return
        iteration = get_args().curr_iteration + 1
        text = f"iteration {iteration} is off: {'; '.join(map(str, deviations))}{action}"
        facts = {deviation.name.replace(" ", "_"): deviation.value for deviation in deviations}
        self._warnings.warn(text, iteration, **facts)
        log_scalars({_TAGS[deviation.name]: deviation.deviations for deviation in deviations}, iteration)


def _saved_history(args: Namespace) -> dict[str, list[float]] | None:
    """Return the losses and norms of the steps before the checkpoint to load; None if the checkpoint holds none."""
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None or args.finetune:
        return None
    return getattr(load_common_state_dict(checkpoint).get("args"), "spike_history", None)


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
