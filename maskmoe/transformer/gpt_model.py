"""The GPT model that hands the token ids down to its routers."""

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from maskmoe.transformer.visible_experts import VisibleExperts

# Where `GPTModel._preprocess` puts the padding mask among its outputs.
_PADDING_MASK = 5


class MaskMoEGPTModel(GPTModel):
    """`GPTModel` whose MoE layers route by token id.

    The ids ride on `padding_mask`, which Megatron-Core passes along with the hidden states through pipeline chunks,
    recomputation and multi-token prediction. So every pipeline stage must be given `input_ids`, also those without an
    embedding.

    Args:
        visible_experts: the routing mask shared by the model's routers.
        other arguments: those of `GPTModel`.
    """

    def __init__(self, *args, visible_experts: VisibleExperts, **kwargs):
        super().__init__(*args, **kwargs)
        self.routing_mask = visible_experts

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, padding_mask: Tensor | None = None, **kwargs):
        """As `GPTModel._preprocess`, with the ids of this rank's tokens in the place of `padding_mask`.

        Raises:
            ValueError: a padding mask, which is not supported, or no token ids.
        """
        if padding_mask is not None:
            raise ValueError("MaskMoEGPTModel takes no padding mask")
        if input_ids is None:
            raise ValueError("MaskMoEGPTModel needs input_ids on every pipeline stage: its routers choose by token id")
        outputs = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        outputs[_PADDING_MASK] = self._token_ids_of_this_rank(input_ids)
        return tuple(outputs)

    def _token_ids_of_this_rank(self, input_ids: Tensor) -> Tensor:
        """The ids [batch, sequence / tp] of the part of the sequence that this rank holds."""
        if not self.config.sequence_parallel:
            return input_ids
        tp_group = self.pg_collection.tp
        return input_ids.chunk(get_pg_size(tp_group), dim=1)[get_pg_rank(tp_group)]
