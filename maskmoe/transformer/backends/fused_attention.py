"""Attention for models without Transformer Engine, by torch's fused kernels."""

from contextlib import nullcontext
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from maskmoe.transformer.dispatch.rows import is_on_cpu


class FusedDotProductAttention(DotProductAttention):
    """`DotProductAttention` by `scaled_dot_product_attention`, whose kernels for GPUs keep no scores.

    The stock module keeps `heads * sequence * sequence` scores for each sample. Parameters and checkpoints are those of
    the stock module, which also computes on CPUs and for settings that the function lacks.

    Args: those of `DotProductAttention`.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        # The stock softmax multiplies by the layer's number again if `softmax_scale` was divided by it.
        self._scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        self._can_fuse = (
            self.attn_mask_type == AttnMaskType.causal
            and self.scale_mask_softmax.window_size is None
            and self.softmax_offset is None
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Compute attention.

        Args:
            query: [queries, batch, heads, channels].
            key: [keys, batch, groups, channels].
            value: [keys, batch, groups, channels].
            attention_mask: bool [batch or 1, 1, queries, keys], True for keys that a query must not see; None: causal.
            attn_mask_type: ignored, as by the stock method.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [queries, batch, heads * channels].
        """
        has_mask = attention_mask is not None or len(query) == len(key)
        is_plain = attention_bias is None and packed_seq_params is None
        if is_on_cpu(query) or not (self._can_fuse and has_mask and is_plain):
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        dropout = self.attention_dropout.p if self.training else 0.0
        # As in the stock method, tensor-parallel ranks hold different heads, so each rank draws its own dropout.
        own_draws = dropout > 0 and not self.config.sequence_parallel
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if own_draws else nullcontext():
            context = scaled_dot_product_attention(
                *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)),  # [batch, heads, sequence, channels]
                attn_mask=None if attention_mask is None else ~attention_mask,
                dropout_p=dropout,
                is_causal=attention_mask is None,
                scale=self._scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).flatten(2)
