"""The layer of multi-token prediction, whose MoE layer gets the ids of the tokens that it routes."""

from dataclasses import replace
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from maskmoe.transformer.token_ids import gather_sequence, split_sequence


class MaskMoEMultiTokenPredictionLayer(MultiTokenPredictionLayer):
    """`MultiTokenPredictionLayer` that shifts token ids correctly under sequence parallelism, too.

    Each layer embeds the tokens one position further on, and shifts `padding_mask`, which holds the token ids, along.
    The stock layer shifts only the part of the sequence that a rank holds. The last token of the part then gets id 0
    instead of the id of the next rank's first token.
    """

    def __init__(self, *args: Any, hybrid_submodules: HybridStackSubmodules | None = None, **kwargs: Any) -> None:
        # `HybridStack` does not pass `is_mtp_layer` to MoE layers. Without experts, no MoE layer has a spec.
        if hybrid_submodules is not None and isinstance(hybrid_submodules.moe_layer, ModuleSpec):
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
