"""Hybrid models, whose layers follow a pattern: with MoE layers that route by token id, and without experts."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.transformer.gathered_parameters import wait_for_convolutions
from maskmoe.transformer.model_mixin import RoutesByTokenId
from maskmoe.transformer.packed_documents import PackingModel
from maskmoe.transformer.torch_modules.cross_entropy import CrossEntropyOfOneCopy
from maskmoe.transformer.visible_experts import VisibleExperts


class CompletedHybridModel(HybridModel):
    """`HybridModel` with what Megatron-Core leaves out: scaled rotary embeddings, and waiting for convolutions.

    Rotary embeddings can be scaled as Llama 3 does, like those of `GPTModel`. Gated delta nets wait until the
    parameters of their convolution are gathered, see `wait_for_convolutions`.

    Args:
        args: positional arguments of `HybridModel`.
        rope_scaling: whether to scale rotary embeddings.
        rope_scaling_factor: divides low frequencies of rotary embeddings.
        kwargs: keyword arguments of `HybridModel`.
    """

    def __init__(self, *args: Any, rope_scaling: bool = False, rope_scaling_factor: float = 8.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rope_scaling and self.position_embedding_type == "rope" and not self.config.multi_latent_attention:
            assert self.config.kv_channels is not None  # `TransformerConfig` sets the default.
            self.rotary_pos_emb = RotaryEmbedding(
                self.config.kv_channels,
                kwargs.get("rotary_percent", 1.0),
                seq_len_interpolation_factor=cast(float, kwargs.get("seq_len_interpolation_factor")),
                rotary_base=kwargs.get("rotary_base", 10000),
                rope_scaling=True,
                rope_scaling_factor=rope_scaling_factor,
                use_cpu_initialization=self.config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
        wait_for_convolutions(self)


class DenseHybridModel(PackingModel, CrossEntropyOfOneCopy, CompletedHybridModel):
    """`HybridModel` without experts, with packed documents and the loss of `MaskMoEHybridModel`."""


class _HybridModelWithIds(RoutesByTokenId, CrossEntropyOfOneCopy, CompletedHybridModel):
    """`HybridModel` that passes token ids to all layers, those of multi-token prediction included."""

    def forward(self, input_ids: Tensor, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Run one pipeline stage as `HybridModel` does, with packed token ids as `padding_mask`.

        Raises:
            ValueError: no token ids, or a padding mask of another shape.
        """
        packed = self.pack_for_layers(input_ids, padding_mask)
        with self._passing_to_prediction(packed):
            return super().forward(input_ids, *args, padding_mask=packed, **kwargs)

    @contextmanager
    def _passing_to_prediction(self, packed: Tensor) -> Iterator[None]:
        """Pass the token ids to multi-token prediction, to which `HybridModel` passes no padding mask."""
        if not self.mtp_process:
            yield
            return
        hook = self.mtp.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "padding_mask": packed}), with_kwargs=True
        )
        try:
            yield
        finally:
            hook.remove()


class MaskMoEHybridModel(PackingModel, _HybridModelWithIds):
    """`HybridModel` whose MoE layers route by token id.

    Every pipeline stage must be given `input_ids`, and can be given a padding mask, as for `MaskMoEGPTModel`. With
    equal weights, a model and its twin of the other class compute the same bits: a transformer layer of
    `MaskMoEGPTModel` is two symbols of the pattern, attention and MLP or MoE layer.

    Args:
        args: positional arguments of `HybridModel`.
        visible_experts: the routing mask shared by the model's routers.
        kwargs: keyword arguments of `HybridModel`.
    """

    def __init__(self, *args: Any, visible_experts: VisibleExperts, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._number_moe_layers()
        self.set_routing_mask(visible_experts)

    def _number_moe_layers(self) -> None:
        """Number each MoE layer among the feed-forward layers of decoder or multi-token prediction, as in the twin.

        `HybridModel` counts all symbols, and starts from 1 again in each depth of multi-token prediction.
        """
        parsed = parse_hybrid_pattern(self.hybrid_layer_pattern)
        _number(self.decoder.layers, (parsed.main_pattern or "").replace(Symbols.PIPE, ""), before=0)
        pattern = parsed.mtp_pattern or ""
        predictions: Any = self.mtp.layers if self.mtp_process else ()
        for depth, prediction in enumerate(predictions):
            _number(prediction.mtp_model_layer.layers, pattern, before=depth * _num_feed_forward(pattern))


def _number(layers: Iterable[Any], pattern: str, before: int) -> None:
    """Number the MoE layers among the feed-forward layers of a pattern, which follow `before` others."""
    for layer in layers:
        if isinstance(getattr(layer, "mlp", None), MoELayer):  # Mamba layers have none
            layer.mlp.set_layer_number(before + _num_feed_forward(pattern[: layer.layer_number]))


def _num_feed_forward(pattern: str) -> int:
    """Return the number of MLPs and MoE layers in a pattern."""
    return len(FeedForwardLayers.of_pattern(pattern).decoder)
