"""The layers of a hybrid model on one pipeline stage."""

from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import TransformerConfig


class MaskMoEHybridStack(HybridStack):
    """`HybridStack` whose final norm comes from the spec; the stock class always uses Transformer Engine's norm.

    Args:
        config: the model's configuration.
        submodules: the spec of each kind of layer.
        final_norm: builds the norm after the last layer.
        post_layer_norm: whether there is a norm after the last layer.
        post_process: whether this is the last pipeline stage.
        kwargs: further arguments of `HybridStack`.

    Raises:
        ValueError: `submodules` has no spec for the symbol of a layer, which `HybridStack` would silently leave out.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: LayerNormBuilder,
        post_layer_norm: bool = True,
        post_process: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, post_layer_norm=False, post_process=post_process, **kwargs)
        missing = {
            symbol
            for symbol, layer in zip(self.layer_type_list, self.layers, strict=True)
            if isinstance(layer, IdentityOp)
        }
        if missing:
            raise ValueError(f"there is no layer for the symbols {', '.join(sorted(missing))} with these settings")
        self.post_layer_norm = post_layer_norm
        if post_process and post_layer_norm:
            norm: Any = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            self.final_norm = norm
