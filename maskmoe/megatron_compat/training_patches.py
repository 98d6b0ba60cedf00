"""Patches of Megatron-Core that concern training steps, for processes that train.

Each function replaces something of megatron-core 0.19.2 and says what, why, and when the patch can go.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.training import training
from megatron.training.training import num_floating_point_operations

from maskmoe.megatron_compat import replace


def call_after_steps(after_step: Callable[[tuple], object]) -> None:
    """Call a function with the results of each training step; an error that it raises ends the run.

    Replaces: `megatron.training.training.train_step`.
    Why: Megatron calls no function of its caller between a step and the checkpoint of this step. A step that is off
        must be known before a checkpoint holds its update.
    Can go: When Megatron calls a function of its caller after each step.
    """
    stock = training.train_step

    @wraps(stock)
    def train_step(*args: Any, **options: Any) -> tuple:
        results = stock(*args, **options)
        after_step(results)
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
