"""Patches of Megatron-Core that concern training steps, and its tracker of routers' losses, for processes that train.

Each function replaces something of megatron-core 0.19.2 and says what, why, and when the patch can go.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.training import training
from megatron.training.training import num_floating_point_operations
from torch import Tensor

from maskmoe.megatron_compat import replace
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers


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


class RouterLossTracker(MoEMetricsTracker):
    """A `MoEMetricsTracker` that reports means over the MoE layers of the model, on every pipeline stage.

    Megatron-Core 0.19.2 reports other values in four cases. Later versions solve the first two (Megatron-LM pull
    request 6748).

    - It records the losses of a hybrid model by symbol of the pattern, and reports by MoE layer. A pipeline stage
      without MoE layers then reduces a tensor of another size than other stages.
    - It counts layers of multi-token prediction that have no experts, and a repeated layer once for each prediction.
    - A pipeline stage without MoE layers does not add up the parts of the tensor- and context-parallel ranks. The last
      stage, whose values are logged, can be such a stage.
    - If the only load-balancing loss is that of sequences, or the global one, it also reports a load-balancing loss of
      micro-batches, of 0, because it looks for `aux_loss` in the name of the loss.
    """

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        self._layers = FeedForwardLayers.of_args(args)
        # Megatron-Core counts the layers of the decoder by the symbols of a pattern.
        self._num_symbols = args.num_layers
        predictions = self._layers.prediction
        if predictions and args.mtp_use_repeated_layer:
            predictions = predictions[: len(predictions) // args.mtp_num_layers]
        self._counted = [int(has_experts) for has_experts in self._layers.decoder + predictions]
        has_other_loss = args.moe_router_load_balancing_type in ("seq_aux_loss", "global_aux_loss")
        self._absent = {"load_balancing_loss"} if has_other_loss else set()

    def record(self, name: str, value: Tensor, layer_number: int, num_layers: int, *args: Any, **groups: Any) -> None:
        """Add a value to the record of a MoE layer, see `MoEMetricsTracker.record`."""
        if layer_number > self._num_symbols:  # The router is a layer of multi-token prediction.
            layer_number += len(self._layers.decoder) - self._num_symbols
        super().record(name, value, layer_number, len(self._layers.has_experts), *args, **groups)

    def report(self, *args: Any, track_names: list[str], **settings: Any) -> str:
        """Log the means over the MoE layers of the model, see `MoEMetricsTracker.report`."""
        num_layers, groups = len(self._layers.has_experts), get_default_pg_collection()
        track_names = [name for name in track_names if name not in self._absent]
        # Tell every stage, by a loss of 0, over which ranks the routers' losses are parts of a sum.
        nothing = torch.zeros((), device=torch.cuda.current_device())
        for name in track_names:
            is_global = name == "global_load_balancing_loss"
            group = groups.tp_dp_cp if is_global else groups.tp_cp
            super().record(name, nothing, 1, num_layers, reduce_group=group, needs_dp_avg=not is_global)
        layers: dict[str, Any] = {"num_layers": num_layers, "moe_layer_freq": self._counted, "mtp_num_layers": None}
        return super().report(*args, track_names=track_names, **settings | layers)
