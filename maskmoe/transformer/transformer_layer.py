"""Layers that keep the token ids where Megatron-Core's layers lose them."""

from dataclasses import replace
from typing import Any

from megatron.core import package_info
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from maskmoe.transformer.token_ids import gather_sequence, split_sequence


class MaskMoETransformerLayer(TransformerLayer):
    """`TransformerLayer` whose MoE layer gets the token ids also if the attention is a CUDA graph.

    With `cuda_graph_impl="transformer_engine"` and graphs of the attention, `TransformerLayer` replays the graph and
    then calls the rest of the layer without `padding_mask`, on which the token ids travel. This class keeps the ids
    aside: the graph never sees them, so no ids are captured, and the MoE layer gets the ids of its own micro-batch.
    Only for versions of Megatron-Core whose layers do not take `input_ids`.
    """

    _ids_of_replay: Tensor | None = None

    def _te_cuda_graph_replay(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Replay the graph of this micro-batch, and run the part of the layer that is not captured."""
        self._ids_of_replay = padding_mask
        try:
            return super()._te_cuda_graph_replay(*args, **kwargs)
        finally:
            self._ids_of_replay = None

    def _forward_mlp(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """Compute the MLP or MoE layer, after a replay with the ids that were kept aside."""
        padding_mask = self._ids_of_replay if padding_mask is None else padding_mask
        return super()._forward_mlp(*args, padding_mask=padding_mask, **kwargs)


class MaskMoEMultiTokenPredictionLayer(MultiTokenPredictionLayer):
    """`MultiTokenPredictionLayer` that shifts token ids correctly under sequence parallelism, too.

    Each layer embeds the tokens one position further on, and shifts `padding_mask`, which holds the token ids, along.
    The stock layer shifts only the part of the sequence that a rank holds. The last token of the part then gets id 0
    instead of the id of the next rank's first token.
    """

    def __init__(self, *args: Any, hybrid_submodules: HybridStackSubmodules | None = None, **kwargs: Any) -> None:
        # `HybridStack` of 0.19 does not pass `is_mtp_layer` to MoE layers. Without experts, no MoE layer has a spec.
        is_older = package_info.__version__.startswith("0.19.")
        if is_older and hybrid_submodules is not None and isinstance(hybrid_submodules.moe_layer, ModuleSpec):
            moe_layer = hybrid_submodules.moe_layer
            moe_layer = replace(moe_layer, params={**moe_layer.params, "is_mtp_layer": True})
            hybrid_submodules = replace(hybrid_submodules, moe_layer=moe_layer)
        super().__init__(*args, hybrid_submodules=hybrid_submodules, **kwargs)

    def _get_embeddings(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple:
        """Shift ids and embed them, as the overridden method does.

        `padding_mask` is this rank's part of the packed ids.
        """
        if not self.sequence_parallel or padding_mask is None:
            return super()._get_embeddings(*args, padding_mask=padding_mask, **kwargs)
        assert self.tp_group is not None
        whole = gather_sequence(padding_mask, self.tp_group)
        input_ids, position_ids, shifted, *rest = super()._get_embeddings(*args, padding_mask=whole, **kwargs)
        assert shifted is not None
        return input_ids, position_ids, split_sequence(shifted, self.tp_group), *rest
