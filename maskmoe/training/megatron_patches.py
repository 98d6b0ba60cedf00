"""The patches of Megatron-Core that concern training steps, for runs that train.

Each patch replaces something of megatron-core 0.19.2 and says what, why, and when the patch can go.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.training import training
from megatron.training.training import num_floating_point_operations
from torch import Tensor

from maskmoe.megatron_compat import replace
from maskmoe.training.watch.callback import Step

AllowsUpdate = Callable[[list[dict[str, Tensor]], float], bool]
"""Takes the losses of this rank's micro-batches and the norm of the gradient before clipping.

All ranks call the function and must get the same answer, whether the optimizer may update the weights.
"""


def watch_steps(after_step: Callable[[Step], object], allows_update: AllowsUpdate | None = None) -> None:
    """Call a function after each training step, and ask another one before each update; for runs that train.

    An error that `after_step` raises ends the run. `allows_update` is not asked if it is None.

    Replaces: `megatron.training.training.train_step`, and in its first call, if `allows_update` is given, the methods
        `get_grad_norm` and `step_with_ready_grads` of the optimizer.
    Why: Megatron calls no function of its caller between a step and the checkpoint of this step. A step that is off
        must be known before a checkpoint holds its update. Megatron also computes the norm of the gradient and updates
        the weights in one call, and asks nobody in between. Its own limit, `grad_norm_skip_threshold`, is a fixed
        number, and knows no loss. A refused update is reported like the update of a gradient that is not finite, so
        Megatron handles both in the same way.
    Can go: When Megatron calls functions of its caller before each update and after each step.
    """
    stock_train_step = training.train_step
    losses: list[dict[str, Tensor]] = []
    is_gated = allows_update is None

    def gate(optimizer: Any, allows: AllowsUpdate) -> None:
        compute_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
        norms: list[float] = []

        def get_grad_norm() -> Any:
            norm = compute_norm()
            norms[:] = [float(norm)]
            return norm

        replace(optimizer, "get_grad_norm", get_grad_norm)
        replace(optimizer, "step_with_ready_grads", lambda: allows(losses, norms[0]) and update())

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
        if allows_update is not None and not is_gated:
            gate(optimizer, allows_update)
            is_gated = True

        def forward_backward_keeping_losses(*args: Any, **options: Any) -> list[dict[str, Tensor]]:
            losses[:] = forward_backward(*args, **options)
            return losses

        step = (forward_step, data_iterator, model, optimizer, scheduler, config, forward_backward_keeping_losses)
        results = stock_train_step(*step, *args, **options)
        logged, is_skipped, _, should_exit, _, grad_norm, *_ = results
        norm = None if grad_norm is None else float(grad_norm)
        after_step(Step(logged, norm, has_updated=not (is_skipped or should_exit)))
        return results

    replace(training, "train_step", train_step)


def count_operations(mean_experts: float, args: Namespace, *sizes: Any, **named_sizes: Any) -> float:
    """Count the floating-point operations of a batch as Megatron does, with `mean_experts` experts a token.

    `args` are validated; the sizes are those of Megatron's `num_floating_point_operations`.
    """
    counted = Namespace(**vars(args) | {"moe_router_topk": mean_experts})
    operations = num_floating_point_operations(counted, *sizes, **named_sizes)
    if num_latent := (args.hybrid_layer_pattern or "").count(Symbols.MLA):
        # Megatron counts no latent attention in hybrid models. Count a GPT model that has nothing else.
        attention = {"hybrid_layer_pattern": None, "num_layers": num_latent, "mtp_num_layers": None}
        attention |= {"num_experts": None, "ffn_hidden_size": 0, "padded_vocab_size": 0}
        alone = Namespace(**vars(args) | attention)
        operations += num_floating_point_operations(alone, *sizes, **named_sizes)
    return operations


def count_operations_by_mask(mean_experts: float) -> None:
    """Let Megatron log the operations that `count_operations` counts with a mean of experts; for runs that train.

    Replaces: `megatron.training.training.num_floating_point_operations`.
    Why: Megatron counts k experts for each token, also for tokens with fewer visible experts. In hybrid models, it
        counts no latent attention.
    Can go: When the caller of Megatron can name the number of experts of a token, and Megatron counts latent attention.
    """
    replace(training, "num_floating_point_operations", partial(count_operations, mean_experts))
