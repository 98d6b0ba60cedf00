"""Core attention of models without Transformer Engine, by torch's `scaled_dot_product_attention`."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, get_cuda_rng_tracker
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from maskmoe.transformer.packed_documents import PackedDocuments

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal, AttnMaskType.causal_bottom_right)
SHORTEST_BLOCK = 256
"""The smallest number of queries in a block of a layer with a window."""

# The widest heads of torch's kernel for packed documents, and whether this version of torch has what is needed of it.
_WIDEST_PACKED_HEAD = 256
_HAS_PACKED_KERNEL = {"scale", "window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()


class TorchDotProductAttention(DotProductAttention):
    """`DotProductAttention` by `scaled_dot_product_attention`, whose fused kernels keep no scores.

    The stock module keeps `heads * queries * keys` scores for each sample. Parameters and checkpoints are those of the
    stock module. Two cases need memory for each pair of a query and a key: a given mask is kept once for all heads, as
    a bias of the queries' type; and torch's CPU kernel has no dropout, so attention dropout on a CPU computes all
    scores.

    The mask type, the mask and the window say which keys a query sees:

    - A causal layer without a given mask sees the keys up to the query. The last query sees the last key, also if
      there are fewer queries than keys, as behind a cache.
    - A given mask hides keys. Only `AttnMaskType.padding_causal` also hides the keys after the query.
    - A window `(left, right)` hides all but `left` keys before the query and `right` keys after the query; -1 hides
      none. In a causal layer, `right` is 0. A mask can hide further keys.

    The output is zero for a query that sees no key.

    Packed documents are one sequence without a batch dimension, in which a query sees keys of its own document only.
    `varlen_attn` computes them on GPUs, in half precision without dropout and without a softmax offset. In all other
    cases, one document is computed after the other.

    Under context parallelism, each rank gathers the keys and values of the whole sequence. Megatron cuts the sequence
    into twice as many chunks as ranks, and gives rank r the chunks r and 2 * ranks - 1 - r.

    The scores are multiplied by `softmax_scale`, or divided by the square root of `k_channels`. `v_channels` is unused,
    because the values have their own width.
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
        if config.softmax_type == "learnable":
            # Tensor-parallel ranks hold the offsets of different heads, so all ranks count in the gradient's norm.
            set_tensor_model_parallel_attributes(self.softmax_offset, is_parallel=True, dim=0, stride=1)

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
            packed_seq_params: `PackedDocuments`, or None for sequences of a batch.

        Returns:
            [queries, batch, heads * value channels]; [tokens, heads * value channels] with packed documents.

        Raises:
            NotImplementedError: An attention bias, or packed sequences that are not `PackedDocuments`.
        """
        if attention_bias is not None:
            raise NotImplementedError("attention of --transformer-impl local takes no bias")
        dropout = self.attention_dropout.p if self.training else 0.0
        # As in the stock method, tensor-parallel ranks hold different heads, so each rank draws its own dropout.
        own_draws = dropout > 0 and not self.config.sequence_parallel
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if own_draws else nullcontext():
            if packed_seq_params is not None:
                if not isinstance(packed_seq_params, PackedDocuments):
                    raise NotImplementedError(
                        "attention of --transformer-impl local takes packed sequences as "
                        "maskmoe.transformer.packed_documents.PackedDocuments only"
                    )
                return self._attend_within_documents(query, key, value, packed_seq_params, dropout).flatten(1)
            if self.cp_group.size() > 1:
                key, value = (gather_zigzag(tensor, self.cp_group) for tensor in (key, value))
            query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            return self._attend_in_blocks(query, key, value, attention_mask, dropout).flatten(2)

    def _attend_in_blocks(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend with each block of queries to the keys that the block can see.

        Queries are [batch, heads, queries, channels], keys and values [batch, groups, keys, channels], the mask as in
        `forward`, and the result [queries, batch, heads, value channels].
        """
        value_channels = value.shape[-1]
        query, key, value = self._widen(query, key, value)
        contexts = []
        for queries, keys, band in self._blocks(query.shape[2], key.shape[2], has_mask=attention_mask is not None):
            hidden = None
            if attention_mask is not None:
                hidden = attention_mask.expand(-1, -1, query.shape[2], -1)[:, :, queries, keys]
            context = self._attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], band, hidden, dropout)
            contexts.append(context.permute(2, 0, 1, 3))
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        return context[..., :value_channels]

    def _attend_within_documents(
        self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments, dropout: float
    ) -> Tensor:
        """Attend within each document.

        Queries are [tokens, heads, channels], keys and values [tokens, groups, channels], and the result
        [tokens, heads, value channels].
        """
        if dropout == 0 and self._fits_packed_kernel(query, value):
            return self._run_packed_kernel(query, key, value, documents)
        contexts = []
        for document in zip(*(tensor.split(documents.lengths) for tensor in (query, key, value)), strict=True):
            # [1, heads, tokens, channels]
            query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in document)
            contexts.append(self._attend_in_blocks(query, key, value, None, dropout).squeeze(1))
        return torch.cat(contexts)

    def _fits_packed_kernel(self, query: Tensor, value: Tensor) -> bool:
        """Return whether `varlen_attn` can compute attention without dropout to these queries and values."""
        return (
            _HAS_PACKED_KERNEL
            and query.is_cuda
            and query.dtype in (torch.bfloat16, torch.float16)
            and max(query.shape[-1], value.shape[-1]) <= _WIDEST_PACKED_HEAD
            and self.softmax_offset is None
        )

    def _run_packed_kernel(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
        """Attend within each document by `varlen_attn`; see `_attend_within_documents`."""
        # The kernel wants equal widths.
        value_channels = value.shape[-1]
        width = _round_up(max(query.shape[-1], value_channels))
        query, key, value = (pad(tensor, (0, width - tensor.shape[-1])) for tensor in (query, key, value))
        left, right = self._reach(has_mask=False)
        # `varlen_attn` prefers cuDNN, whose gradients have no fixed order of additions in torch.
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if is_deterministic else nullcontext():
            context: Any = varlen_attn(
                query,
                key,
                value,
                documents.bounds,
                documents.bounds,
                documents.max_seqlen_q,
                documents.max_seqlen_kv,
                scale=self._scale,
                window_size=(-1 if left is None else left, -1 if right is None else right),
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return context[..., :value_channels]

    def _widen(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append channels of zeros until queries, keys and values have the same width, as fused kernels want.

        With a softmax offset, the last channel of the queries is new and holds the offset of the head, see `_add_sink`.
        """
        width = max(query.shape[-1], value.shape[-1])
        if self.softmax_offset is not None:
            width = _round_up(max(query.shape[-1] + 1, value.shape[-1]))
            offset = (self.softmax_offset.to(query) / self._scale).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
            query = torch.cat([pad(query, (0, width - 1 - query.shape[-1])), offset], dim=-1)
        query, key, value = (
            tensor if tensor.shape[-1] == width else pad(tensor, (0, width - tensor.shape[-1]))
            for tensor in (query, key, value)
        )
        return query, key, value

    def _blocks(self, num_queries: int, num_keys: int, has_mask: bool) -> Iterator[tuple[slice, slice, "_Band"]]:
        """Yield blocks of consecutive queries, the keys that they see, and their band; the blocks are in order."""
        left, right = self._reach(has_mask)
        # Find this rank's consecutive queries: their first index, and their position in the sequence.
        ranks = self.cp_group.size()
        if ranks == 1:
            chunks, length = [(0, num_keys - num_queries)], num_queries
        else:
            length, rank = num_queries // 2, self.cp_group.rank()
            chunks = [(0, rank * length), (length, (2 * ranks - 1 - rank) * length)]
        if left is None and right is None:
            # All queries see the same keys.
            chunks, length = [(0, 0)], num_queries
        # In a window, short blocks compute few pairs that the window hides.
        step = length if left is None else max(left, SHORTEST_BLOCK)
        for first_query, position in chunks:
            for start in range(0, length, step):
                end = min(start + step, length)
                first_key = 0 if left is None else max(0, position + start - left)
                end_key = num_keys if right is None else min(num_keys, position + end + right)
                band = _Band(end - start, end_key - first_key, position + start - first_key, left, right)
                yield slice(first_query + start, first_query + end), slice(first_key, end_key), band

    def _reach(self, has_mask: bool) -> tuple[int | None, int | None]:
        """Return how many keys before and after its own position a query sees, None for all; a mask can hide more."""
        is_causal = self.attn_mask_type in _CAUSAL
        if self._window is None:
            hides_later = is_causal and (not has_mask or self.attn_mask_type == AttnMaskType.padding_causal)
            return None, 0 if hides_later else None
        left, right = (None if size < 0 else size for size in self._window)
        return left, 0 if is_causal else right

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, band: "_Band", hidden: Tensor | None, dropout: float
    ) -> Tensor:
        """Attend with one block of queries.

        Queries are [batch, heads, queries, channels], keys and values [batch, groups, keys, channels], and the result
        [batch, heads, queries, channels]. `hidden`, bool [batch or 1, 1, queries, keys], is True for keys that a query
        must not see.
        """
        # Fused kernels compute a causal mask, and read other masks from a bias.
        is_causal = hidden is None and band.is_causal and (band.queries == band.keys or query.is_cuda)
        bias = None if is_causal or band.shows_all else _bias_of(band, query.dtype, query.device)
        if hidden is not None:
            bias = (query.new_zeros(()) if bias is None else bias).masked_fill(hidden, float("-inf"))
        is_square = band.queries == band.keys
        if self.softmax_offset is not None:
            query, key, value, bias = _add_sink(query, key, value, bias, with_query=is_causal and is_square)
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1 and query.is_cuda and (bias is not None or query.dtype == torch.float32):
            # The kernel for GPUs that takes a bias, or fp32, wants as many heads of keys as of queries. `expand` has a
            # deterministic gradient.
            key, value = (t.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, value))
        lower_right: Any = causal_lower_right(query.shape[2], key.shape[2]) if is_causal and not is_square else None
        context = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias if lower_right is None else lower_right,
            dropout_p=dropout,
            is_causal=is_causal and is_square,
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return context[:, :, -band.queries :]


def _round_up(width: int) -> int:
    """Return the next multiple of 8 channels, which kernels for GPUs want."""
    return -(-width // 8) * 8


class _Band(NamedTuple):
    """The keys that the queries of a block see: those from `left` before to `right` after the query's position.

    Attributes:
        queries: Number of queries.
        keys: Number of keys.
        position: Position of the first query among the keys.
        left: Number of keys before a query that the query sees; None: all.
        right: Number of keys after a query that the query sees; None: all.
    """

    queries: int
    keys: int
    position: int
    left: int | None
    right: int | None

    @property
    def hides_earlier(self) -> bool:
        """Whether a query does not see the first key."""
        return self.left is not None and self.left < self.position + self.queries - 1

    @property
    def shows_all(self) -> bool:
        """Whether each query sees all keys."""
        return not self.hides_earlier and (self.right is None or self.position + self.right >= self.keys - 1)

    @property
    def is_causal(self) -> bool:
        """Whether each query sees all keys up to its own position, and the last query the last key."""
        return not self.hides_earlier and self.right == 0


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _bias_of(band: _Band, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the bias [queries, keys] of a band, -inf for hidden keys; layers share the tensor."""
    query = torch.arange(band.queries, device=device).unsqueeze(1) + band.position
    key = torch.arange(band.keys, device=device)
    hidden = torch.zeros(band.queries, band.keys, dtype=torch.bool, device=device)
    if band.left is not None:
        hidden |= key < query - band.left
    if band.right is not None:
        hidden |= key > query + band.right
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _add_sink(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, with_query: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Put a key that all queries see before the other keys; its score is the softmax offset, its value is zero.

    The keys are zero in the last channel, in which the queries hold the offset. There the new key is one.
    Shapes are those of `_attend`, and [..., queries, keys] of a bias. `with_query` also puts a query of zeros before
    the other queries, so that a causal mask stays square.
    """
    sink = torch.zeros_like(key[:, :, :1])
    sink[..., -1] = 1
    key = torch.cat([sink, key], dim=2)
    value = pad(value, (0, 0, 1, 0))
    query = pad(query, (0, 0, 1, 0)) if with_query else query
    return query, key, value, None if bias is None else pad(bias, (1, 0))


def gather_zigzag(tensor: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Gather the sequence [sequence, ...] from the chunks [sequence / ranks, ...] of the context-parallel ranks.

    Rank r holds the chunks r and 2 * ranks - 1 - r. The backward pass adds up the gradients of all ranks.
    """
    gathered = gather_from_sequence_parallel_region(tensor, group=cp_group)
    of_ranks = gathered.view(cp_group.size(), 2, len(tensor) // 2, *tensor.shape[1:])
    first_half, second_half = of_ranks.unbind(dim=1)
    return torch.cat([first_half, second_half.flip(0)]).flatten(0, 1)
