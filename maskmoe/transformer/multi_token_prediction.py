"""Multi-token prediction whose layers route by the ids of the tokens that they embed."""

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from maskmoe.transformer.token_ids import gather_sequence, take_part_of_sequence


class MaskMoEMultiTokenPredictionLayer(MultiTokenPredictionLayer):
    """`MultiTokenPredictionLayer` that shifts the token ids right under sequence parallelism, too.

    Each layer embeds the tokens one position further on, and shifts what rides on `padding_mask` along. The stock
    layer shifts the part of the sequence that a rank holds, whose last token then gets an id of 0 rather than that of
    the next rank's first token.
    """

    def _get_embeddings(self, *args, padding_mask: Tensor | None = None, **kwargs) -> tuple:
        """As the method it overrides; padding_mask is what `pack_token_ids` makes, this rank's part of it."""
        if not self.sequence_parallel or padding_mask is None:
            return super()._get_embeddings(*args, padding_mask=padding_mask, **kwargs)
        whole = gather_sequence(padding_mask, self.tp_group)
        input_ids, position_ids, shifted, *rest = super()._get_embeddings(*args, padding_mask=whole, **kwargs)
        return input_ids, position_ids, take_part_of_sequence(shifted, self.tp_group), *rest
