"""The GPT model that hands token ids to its routers."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from maskmoe.transformer.model_mixin import RoutesByTokenId
from maskmoe.transformer.visible_experts import VisibleExperts


class MaskMoEGPTModel(RoutesByTokenId, GPTModel):
    """`GPTModel` whose MoE layers route by token id.

    Every pipeline stage must be given `input_ids`, also stages without an embedding. A padding mask, bool [batch,
    sequence] with True for padding, can be given to all stages as well: the routers then exclude padding from their
    losses and from the counts behind the expert bias, as Megatron-Core's routers do.

    Args:
        args: positional arguments of `GPTModel`.
        visible_experts: the routing mask shared by the model's routers.
        kwargs: keyword arguments of `GPTModel`.
    """

    def __init__(self, *args: Any, visible_experts: VisibleExperts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drop_unused_output_weight()
        self.set_routing_mask(visible_experts)

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple:
        """Compute the inputs of the decoder as `GPTModel` does, with packed token ids as `padding_mask`.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        packed = self.pack_for_layers(input_ids, padding_mask)
        (
            decoder_input,
            rotary_pos_emb,
            rotary_pos_cos,
            rotary_pos_sin,
            sequence_len_offset,
            _padding_mask,
            *rest,
        ) = super()._preprocess(
            input_ids,
            position_ids,
            decoder_input,  # pyrefly: ignore[bad-argument-type]  # None is the default
            inference_context,
            packed_seq_params,
        )
        return decoder_input, rotary_pos_emb, rotary_pos_cos, rotary_pos_sin, sequence_len_offset, packed, *rest

    def _drop_unused_output_weight(self) -> None:
        """Drop the output layer's own weight where embeddings are tied and multi-token prediction holds an embedding.

        The output layer then uses the weight of that embedding. On a later pipeline stage, `GPTModel` also allocates a
        weight in the output layer, which is never used and makes saving a checkpoint fail. `GPTModel` has no argument
        to prevent the allocation.
        """
        if self.share_embeddings_and_output_weights and self.mtp_process and self.post_process:
            self.output_layer.weight = None
