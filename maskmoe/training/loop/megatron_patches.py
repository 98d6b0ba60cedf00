"""Patches of Megatron-Core that concern training steps, for runs that watch their steps.

Each function replaces something of megatron-core 0.19.2 and says what, why, and when the patch can go.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training
from torch import Tensor

from maskmoe.megatron_compat import replace
from maskmoe.training.watch.callback import Step


def call_after_each_step(after_step: Callable[[Step], object]) -> None:
    """Call a function on all ranks with the results of each training step; an error that it raises ends the run.

    Replaces: `megatron.training.training.train_step`.
    Why: Megatron calls no function of its caller between a step and the checkpoint of this step. A step that is off
        must be known before a checkpoint holds its update.
    Can go: When Megatron calls a function of its caller with the results of each step.
    """
    stock_train_step = training.train_step

    @wraps(stock_train_step)
    def train_step(*args: Any, **options: Any) -> tuple:
        results = stock_train_step(*args, **options)
        losses, is_skipped, _, should_exit, _, grad_norm, *_ = results
        norm = None if grad_norm is None else float(grad_norm)
        after_step(Step(losses, norm, has_updated=not (is_skipped or should_exit)))
        return results

    replace(training, "train_step", train_step)


def ask_before_each_update(allows: Callable[[list[dict[str, Tensor]], float], bool]) -> None:
    """Let the optimizer update the weights only if a function allows the update.

    `allows` takes the losses of this rank's micro-batches and the norm of the gradient before clipping. All ranks call
    `allows` and must get the same answer.

    Replaces: `megatron.training.training.train_step`, and in its first call the methods `get_grad_norm` and
        `step_with_ready_grads` of the optimizer.
    Why: Megatron computes the norm of the gradient and updates the weights in one call, and asks nobody in between. Its
        own limit, `grad_norm_skip_threshold`, is a fixed number, and knows no loss. A refused update is reported like
        the update of a gradient that is not finite, so Megatron handles both in the same way.
    Can go: When Megatron asks a function of its caller before each update.
    """
    stock_train_step = training.train_step
    losses: list[dict[str, Tensor]] = []
    norms: list[float] = []

    def gate(optimizer: Any) -> None:
        compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

        def get_grad_norm() -> Any:
            norm = compute_norm()
            norms[:] = [float(norm)]
            return norm

        replace(optimizer, "get_grad_norm", get_grad_norm)
        replace(optimizer, "step_with_ready_grads", lambda: allows(losses, norms[0]) and update())

    is_gated = False

    @wraps(stock_train_step)
    def train_step(
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
        nonlocal is_gated
        if not is_gated:
            gate(optimizer)
            is_gated = True

        def forward_backward_keeping_losses(*args: Any, **options: Any) -> list[dict[str, Tensor]]:
            losses[:] = forward_backward(*args, **options)
            return losses

        step = (forward_step, data_iterator, model, optimizer, scheduler, config, forward_backward_keeping_losses)
        return stock_train_step(*step, *args, **options)

    replace(training, "train_step", train_step)


def skip_iterations_of_interleaved_pipelines() -> None:
    """Let `--iterations-to-skip` work with interleaved pipelines.

    Replaces: `megatron.training.training.dummy_train_step`.
    Why: With an interleaved pipeline, each model chunk of a rank has an iterator of its own. Megatron takes the list of
        the iterators for an iterator, and fails. Megatron also copies the batches to the device, and to other ranks.
    Can go: When `dummy_train_step` accepts a list.
    """

    def draw_batches(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in iterators:
                # Ranks that are not the first of their tensor-parallel group read no data.
                for _ in range(get_num_microbatches() if iterator is not None else 0):
                    next(iterator)

    replace(training, "dummy_train_step", draw_batches)
