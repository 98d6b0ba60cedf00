"""Fails a run whose first step has a NaN or infinite result, before anything is saved."""

import math
from argparse import Namespace

import torch

from maskmoe.errors import RunFailure
from maskmoe.training.watch.callback import Callback, Step
from maskmoe.training.watch.failures import describe_newest_checkpoint


class FirstStepCheck(Callback):
    """Checks the first step of a process, the only step that Megatron does not repeat if its result is not finite.

    The update of the first step is applied, and the next checkpoint would hold the damaged weights.

    Args:
        args: Megatron's arguments.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._is_done = not args.check_for_nan_in_loss_and_grad

    def after_step(self, step: Step) -> None:
        """Check the loss and the gradient norm; a collective call.

        Raises:
            RunFailure: A value of any rank is NaN or infinite.
        """
        if self._is_done:
            return
        self._is_done = True
        values = [float(value) for value in (*step.losses.values(), step.grad_norm) if value is not None]
        is_bad = step.has_updated and not all(map(math.isfinite, values))
        # Only the last pipeline stage has the loss.
        is_bad_on_any = torch.tensor(int(is_bad), device=torch.cuda.current_device())
        torch.distributed.all_reduce(is_bad_on_any, op=torch.distributed.ReduceOp.MAX)
        if is_bad_on_any:
            raise RunFailure(
                f"the loss or gradient of iteration {self._args.curr_iteration + 1} was NaN or infinite. It is the "
                "first iteration since the start, which Megatron does not repeat, so nothing is saved: start the run "
                "again, if possible on other devices; if this happens again, look for the fault in the data and the "
                f"model. {describe_newest_checkpoint(self._args)}"
            )
