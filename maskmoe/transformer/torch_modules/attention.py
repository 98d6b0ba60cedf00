"""Core attention of models without Transformer Engine, by torch's `scaled_dot_product_attention`."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad, scaled_dot_product_attention

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)


class TorchDotProductAttention(DotProductAttention):
    """`DotProductAttention` by `scaled_dot_product_attention`, whose fused kernels keep no scores.

    The stock module keeps `heads * queries * keys` scores for each sample. A given mask, a window, and context
    parallelism need one bool for each pair of a query and a key. Torch's CPU kernel has no dropout, so attention
    dropout on a CPU computes all scores.

    The mask type, the mask and the window say which keys a query sees; the output of a query that sees none is zero:

    - A causal layer without a given mask sees the keys up to the query. The last query sees the last key, also if
      there are fewer queries than keys, as behind a cache.
    - A given mask hides keys. Only `AttnMaskType.padding_causal` also hides the keys after the query.
    - A window `(left, right)` hides all but `left` keys before the query and `right` keys after the query; -1 hides
      none. In a causal layer, `right` is 0. A mask can hide further keys.

    Packed documents are one sequence without a batch dimension, and are computed one after the other. Under context
    parallelism, each rank gathers the keys and values of the whole sequence.

    The scores are multiplied by `softmax_scale`, or divided by the square root of `k_channels`. `v_channels` is unused.

    Raises:
        NotImplementedError: The softmax has an offset.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,
    ) -> None:
        if config.softmax_type != "vanilla":
            raise NotImplementedError(
                f"--softmax-type {config.softmax_type} needs --transformer-impl transformer_engine"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        if softmax_scale is None and k_channels is not None:
            softmax_scale = k_channels**-0.5
        # The stock module refuses context parallelism, so it gets a configuration without.
        stock_config = copy.copy(config)
        stock_config.context_parallel_size = 1
        super().__init__(stock_config, *args, softmax_scale=softmax_scale, pg_collection=pg_collection, **kwargs)
        self.config = config
        self.cp_group: ProcessGroup = pg_collection.cp
        # The stock softmax multiplies by the layer's number again if `softmax_scale` was divided by it.
        self._scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        self._window = self.scale_mask_softmax.window_size

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
            query: [queries, batch, heads, channels]; [tokens, heads, channels] with packed documents.
            key: [keys, batch, groups, channels]; [tokens, groups, channels] with packed documents.
            value: [keys, batch, groups, value channels]; [tokens, groups, value channels] with packed documents.
            attention_mask: bool [batch or 1, 1, queries or 1, keys], True for keys that a query must not see. Under
                context parallelism, the mask has this rank's queries and the keys of the whole sequence. Must be None
                with packed documents.
            attn_mask_type: Ignored, as by the stock method.
            attention_bias: Must be None.
            packed_seq_params: The bounds of packed documents, or None for sequences of a batch.

        Returns:
            [queries, batch, heads * value channels]; [tokens, heads * value channels] with packed documents.

        Raises:
            NotImplementedError: An attention bias.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention of --transformer-impl local takes no bias")
        # As in the stock method, tensor-parallel ranks hold different heads, so each rank draws its own dropout.
        has_dropout = self.training and self.attention_dropout.p > 0
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if has_dropout and not self.config.sequence_parallel else nullcontext():
            if packed_seq_params is None:
                return self._attend_within_sequence(query, key, value, attention_mask)
            assert packed_seq_params.cu_seqlens_q is not None
            lengths: list[int] = packed_seq_params.cu_seqlens_q.diff().tolist()
            queries, keys, values = (each.unsqueeze(1).split(lengths) for each in (query, key, value))
            documents = zip(queries, keys, values, strict=True)
            return torch.cat([self._attend_within_sequence(*document, mask=None) for document in documents]).squeeze(1)

    def _attend_within_sequence(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend within the sequences of a batch, of which a context-parallel rank holds the queries of two chunks.

        Arguments and result are those of `forward`.
        """
        if self.cp_group.size() > 1:
            key, value = (gather_zigzag(each, self.cp_group) for each in (key, value))
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if self.cp_group.size() == 1:
            context = self._attend(query, key, value, key.shape[2] - query.shape[2], mask)
        else:
            rank, length = self.cp_group.rank(), query.shape[2] // 2
            positions = (rank * length, (2 * self.cp_group.size() - 1 - rank) * length)
            masks = (None, None) if mask is None else mask.expand(-1, -1, 2 * length, -1).chunk(2, dim=2)
            chunks = zip(query.chunk(2, dim=2), positions, masks, strict=True)
            contexts = [self._attend(chunk, key, value, position, hidden) for chunk, position, hidden in chunks]
            context = torch.cat(contexts, dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, position: int, hidden: Tensor | None) -> Tensor:
        """Attend with consecutive queries, of which the first is at a position among the keys.

        Queries are [batch, heads, queries, channels], keys and values [batch, groups, keys, channels], and the result
        [batch, heads, queries, value channels]. `hidden`, bool [batch or 1, 1, queries, keys], is True for keys that a
        query must not see.
        """
        left, right = self._reach(has_mask=hidden is not None)
        num_queries, num_keys, value_channels = query.shape[2], key.shape[2], value.shape[3]
        # Fused kernels know the causal mask of as many queries as keys, and read other masks.
        is_causal = hidden is None and left is None and right == 0 and num_queries == num_keys
        visible = None if hidden is None else ~hidden
        if not is_causal and (left, right) != (None, None):
            within_reach = _pairs_within_reach(num_queries, num_keys, position, left, right, query.device)
            visible = within_reach if visible is None else visible & within_reach
        if query.shape[3] != value_channels:
            # Fused kernels want queries, keys and values of the same width.
            width = max(query.shape[3], value_channels)
            query, key, value = (pad(each, (0, width - each.shape[3])) for each in (query, key, value))
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=self.attention_dropout.p if self.training else 0.0,
            is_causal=is_causal,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context[..., :value_channels]

    def _reach(self, has_mask: bool) -> tuple[int | None, int | None]:
        """Return how many keys before and after its own position a query sees, None for all; a mask can hide more."""
        is_causal = self.attn_mask_type in _CAUSAL
        if self._window is None:
            hides_later = is_causal and (not has_mask or self.attn_mask_type == AttnMaskType.padding_causal)
            return None, 0 if hides_later else None
        left, right = (None if size < 0 else size for size in self._window)
        return left, 0 if is_causal else right


def _pairs_within_reach(
    queries: int, keys: int, position: int, left: int | None, right: int | None, device: torch.device
) -> Tensor:
    """Return bool [queries, keys], True for keys from `left` before to `right` after a query; None is any number."""
    distance = torch.arange(keys, device=device) - torch.arange(position, position + queries, device=device)[:, None]
    within_reach = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        within_reach &= distance >= -left
    if right is not None:
        within_reach &= distance <= right
    return within_reach


def gather_zigzag(tensor: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Gather the sequence [sequence, ...] from the chunks [sequence / ranks, ...] of the context-parallel ranks.

    Rank r holds the chunks r and 2 * ranks - 1 - r. The backward pass adds up the gradients of all ranks.
    """
    gathered = gather_from_sequence_parallel_region(tensor, group=cp_group)
    of_ranks = gathered.view(cp_group.size(), 2, len(tensor) // 2, *tensor.shape[1:])
    first_half, second_half = of_ranks.unbind(dim=1)
    return torch.cat([first_half, second_half.flip(0)]).flatten(0, 1)
