"""Patches of Megatron-Core that concern training steps, for runs that watch their steps.

Each function replaces something of megatron-core 0.19.2 and says what, why, and when the patch can go.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import training

from maskmoe.megatron_compat.replacing import replace


def watch_steps(wrap: Callable[[Callable[..., tuple]], Callable[..., tuple]]) -> None:
    """Wrap the function that trains one step.

    Replaces: `megatron.training.training.train_step`.
    Why: Megatron calls no function of its caller between a step and the checkpoint of this step. A step that is off
        must be known before a checkpoint holds its update.
    Can go: When Megatron calls a function of its caller with the results of each step, and lets the function end the
        run.

    Args:
        wrap: Takes Megatron's function and returns a function with the same arguments and results.
    """
    replace(training, "train_step", wrap(training.train_step))


def pass_batches_of_every_chunk() -> None:
    """Let `--iterations-to-skip` work with interleaved pipelines.

    Replaces: `megatron.training.training.dummy_train_step`.
    Why: With an interleaved pipeline, each model chunk of a rank has an iterator of its own. Megatron takes the list of
        the iterators for an iterator, and fails. Megatron also copies the batches to the device, and to other ranks.
    Can go: When `dummy_train_step` accepts a list.
    """

    def pass_batches(data_iterator: Any) -> None:
        iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        while get_rerun_state_machine().should_run_forward_backward(data_iterator):
            for iterator in iterators:
                # Ranks that are not the first of their tensor-parallel group read no data.
                for _ in range(get_num_microbatches() if iterator is not None else 0):
                    next(iterator)

    replace(training, "dummy_train_step", pass_batches)


def gate_updates(optimizer: ChainedOptimizer, allows: Callable[[float], bool]) -> None:
    """Let an optimizer update the weights only if a function allows the update.

    Replaces: `get_grad_norm` and `step_with_ready_grads` of one optimizer.
    Why: Megatron computes the norm of the gradient and updates the weights in one call, and asks nobody in between. Its
        own limit, `grad_norm_skip_threshold`, is a fixed number, and knows no loss. A refused update is reported like
        the update of a gradient that is not finite, so Megatron handles both in the same way.
    Can go: When Megatron asks a function of its caller before each update.

    Args:
        optimizer: The optimizer of the whole model on this rank; changed in place.
        allows: Takes the norm of the gradient before clipping. All ranks call this function and get the same answer.
    """
    compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norms: list[float] = []

    def get_grad_norm() -> Any:
        norm = compute_norm()
        norms[:] = [float(norm)]
        return norm

    replace(optimizer, "get_grad_norm", get_grad_norm)
    replace(optimizer, "step_with_ready_grads", lambda: allows(norms[0]) and update())
