"""GPT models: with MoE layers that route by token id, and without experts."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from maskmoe.transformer.model_mixin import RoutesByTokenId
from maskmoe.transformer.packed_documents import PackingModel
from maskmoe.transformer.torch_modules.cross_entropy import CrossEntropyOfOneCopy
from maskmoe.transformer.visible_experts import VisibleExperts


class DenseGPTModel(PackingModel, CrossEntropyOfOneCopy, GPTModel):
    """`GPTModel` without experts, with packed documents and the loss of `MaskMoEGPTModel`."""


class MaskMoEGPTModel(PackingModel, RoutesByTokenId, CrossEntropyOfOneCopy, GPTModel):
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
        self.set_routing_mask(visible_experts)

    def _preprocess(self, input_ids: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple:
        """Compute the inputs of the decoder as `GPTModel` does, with packed token ids as `padding_mask`.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        packed = self.pack_for_layers(input_ids, padding_mask)
        outputs = super()._preprocess(input_ids, *args, **kwargs)
        decoder_input, rope, rope_cos, rope_sin, sequence_offset, _padding_mask, *rest = outputs
        return decoder_input, rope, rope_cos, rope_sin, sequence_offset, packed, *rest
