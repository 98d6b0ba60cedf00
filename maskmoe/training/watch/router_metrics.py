"""Megatron's record of router losses, for hybrid models."""

from typing import Any

from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from torch import Tensor

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers


class HybridMetricsTracker(MoEMetricsTracker):
    """`MoEMetricsTracker` that counts the feed-forward layers of a hybrid model.

    Megatron-Core 0.19.2 records router losses by symbol of the pattern, and reports by MoE layer. A pipeline stage
    without MoE layers then reduces a tensor of another size than other stages, and the mean of a model with multi-token
    prediction counts the MoE layers of multi-token prediction twice. Later versions count MoE layers (Megatron-LM pull
    request 6748).

    Args:
        layers: the feed-forward layers of the model.
        num_symbols: layers of the decoder, as Megatron-Core counts them.
    """

    def __init__(self, layers: FeedForwardLayers, num_symbols: int) -> None:
        super().__init__()
        self._layers = layers
        self._num_symbols = num_symbols

    def record(  # pyrefly: ignore[bad-override]
        self, name: str, value: Tensor, layer_number: int, num_layers: int, **groups: Any
    ) -> None:
        """Add a value to the record of a MoE layer, see `MoEMetricsTracker.record`."""
        if layer_number > self._num_symbols:  # The router is a layer of multi-token prediction.
            layer_number += len(self._layers.decoder) - self._num_symbols
        super().record(name, value, layer_number, len(self._layers.has_experts), **groups)

    def report(self, *args: Any, **settings: Any) -> str:
        """Log the means over the MoE layers of the model, see `MoEMetricsTracker.report`."""
        layers: dict[str, Any] = {
            "num_layers": len(self._layers.has_experts),
            "moe_layer_freq": [int(has_experts) for has_experts in self._layers.has_experts],
            "mtp_num_layers": None,
        }
        return super().report(*args, **settings | layers)
