"""The transformer layer that keeps token ids beside a CUDA graph of its attention."""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class MaskMoETransformerLayer(TransformerLayer):
    """`TransformerLayer` whose MoE layer gets the token ids also if the attention is a CUDA graph.

    With `cuda_graph_impl="transformer_engine"` and graphs of the attention, `TransformerLayer` replays the graph and
    then calls the rest of the layer without `padding_mask`, on which the token ids travel. This class keeps the ids
    aside: the graph never sees them, so no ids are captured, and the MoE layer gets the ids of its own micro-batch.

    Args: those of `TransformerLayer`.
    """

    _ids_of_replay: Tensor | None = None

    def _te_cuda_graph_replay(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Replay the graph of this micro-batch, and run the part of the layer that is not captured."""
        self._ids_of_replay = padding_mask
        try:
            return super()._te_cuda_graph_replay(*args, **kwargs)
        finally:
            self._ids_of_replay = None

    def _forward_mlp(
        self,
        hidden_states: Tensor,
        inference_context: Any = None,
        padding_mask: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Any:
        """Compute the MLP or MoE layer, after a replay with the ids that were kept aside."""
        if padding_mask is None:
            padding_mask = self._ids_of_replay
        return super()._forward_mlp(hidden_states, inference_context, padding_mask, packed_seq_params)
