"""The logged losses of routers: Megatron's tracker reports some of them wrongly, or lets pipeline stages hang."""

from argparse import Namespace
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers


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
