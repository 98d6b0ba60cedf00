"""The GPT model that hands the token ids down to its routers."""

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from maskmoe.transformer.token_ids import pack_token_ids, take_part_of_sequence
from maskmoe.transformer.visible_experts import VisibleExperts

# Where `GPTModel._preprocess` puts the padding mask among its outputs.
_PADDING_MASK = 5


class MaskMoEGPTModel(GPTModel):
    """`GPTModel` whose MoE layers route by token id.

    The ids ride on `padding_mask`, which Megatron-Core passes along with the hidden states through pipeline chunks,
    recomputation and multi-token prediction. So every pipeline stage must be given `input_ids`, also those without an
    embedding. A padding mask, bool [batch, sequence] with True for padding, may be given to all stages as well: the
    routers then leave padding out of their losses and of the counts behind the expert bias, as Megatron-Core's do.

    Args:
        visible_experts: the routing mask shared by the model's routers.
        other arguments: those of `GPTModel`.
    """

    def __init__(self, *args, visible_experts: VisibleExperts, **kwargs):
        super().__init__(*args, **kwargs)
        self.routing_mask = visible_experts
        if self.share_embeddings_and_output_weights and self.mtp_process and self.post_process:
            # With tied embeddings the output layer takes the weight of the embedding, which is here for multi-token
            # prediction. On a later pipeline stage it has an unused weight besides, and no checkpoint can be saved.
            self.output_layer.weight = None

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args, padding_mask: Tensor | None = None, **kwargs):
        """As `GPTModel._preprocess`, with ids and padding of this rank's tokens in the place of `padding_mask`.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        if input_ids is None:
            raise ValueError("MaskMoEGPTModel needs input_ids on every pipeline stage: its routers choose by token id")
        outputs = list(super()._preprocess(input_ids, position_ids, *args, **kwargs))
        outputs[_PADDING_MASK] = self._token_ids_of_this_rank(pack_token_ids(input_ids, padding_mask))
        return tuple(outputs)

    def _token_ids_of_this_rank(self, packed: Tensor) -> Tensor:
        """What `pack_token_ids` made, [..., sequence / tp]: the part of the sequence that this rank holds."""
        return take_part_of_sequence(packed, self.pg_collection.tp) if self.config.sequence_parallel else packed
