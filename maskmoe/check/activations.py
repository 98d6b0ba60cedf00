"""Estimates the bytes of activations from the tensors that each part of a layer keeps for its backward pass.

The terms follow the forward pass of Megatron-Core's modules. Korthikanti et al., arXiv 2205.05198, section 4, derive
them for layers without experts. Attention keeps no scores, except on CPUs with attention dropout. Transformer Engine's
modules fuse norms and all activation functions; the local modules fuse some. The estimate assumes that all experts get
the same number of rows.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from maskmoe.check.layout import Layout
from maskmoe.check.parameters import Chunk
from maskmoe.transformer.backends.attention import SHORTEST_BLOCK, padded_width
from maskmoe.transformer.backends.swiglu import is_plain_swiglu

_FP32_BYTES = 4
_ID_BYTES = 8


class _Tensors(NamedTuple):
    """Tensors of a layer that the backward pass reads.

    Attributes:
        size: the bytes of the tensors.
        dropped_by: names in `--recompute-modules`; each of these drops the tensors after the forward pass.
    """

    size: float
    dropped_by: tuple[str, ...] = ()


class _Layer(NamedTuple):
    """The bytes that the backward pass of a layer reads.

    Attributes:
        kept: bytes that are kept from the forward pass.
        recomputed: bytes that selective recomputation drops and computes again.
    """

    kept: float
    recomputed: float


class _HeadSizes(NamedTuple):
    """Sizes of the inputs of core attention.

    Attributes:
        heads: number of heads of the queries.
        groups: number of heads of keys and values.
        key_width: channels of each head of queries and keys.
        value_width: channels of each head of values.
    """

    heads: int
    groups: int
    key_width: int
    value_width: int


class ActivationModel:
    """Estimates the activations of one micro-batch on one rank, in bytes.

    Args:
        args: arguments that Megatron has validated.
        config: the model's configuration.
        layout: how the run is divided.
        experts_per_token: mean number of experts that a token is sent to. If experts are padded to their capacity, the
            capacity takes its place.
    """

    def __init__(self, args: Namespace, config: TransformerConfig, layout: Layout, experts_per_token: float) -> None:
        if args.moe_pad_expert_input_to_capacity:
            experts_per_token = args.moe_router_topk * args.moe_expert_capacity_factor
        self.experts_per_token = experts_per_token
        self._config, self._layout = config, layout
        self._padded_vocab = args.padded_vocab_size
        self._rotates = args.position_embedding_type in ("rope", "mrope", "yarn")
        # Transformer Engine has fused kernels for norms and activation functions, and ignores causal masks.
        self._fused = args.transformer_impl == "transformer_engine"
        self._gives_mask = args.create_attention_mask_in_dataloader and not self._fused
        self._is_on_cpu = args.distributed_backend == "gloo"
        self._element = config.params_dtype.itemsize
        self._sequence = layout.seq_length // layout.context
        self._tokens = layout.micro_batch * self._sequence
        # Sequence parallelism divides the tokens between the parts of a layer.
        self._shard = self._tokens / layout.tensor if config.sequence_parallel else self._tokens
        self._hidden = self._shard * config.hidden_size * self._element
        self._dropout_mask = self._shard * config.hidden_size if config.hidden_dropout else 0
        # A layer can be recomputed from its input.
        self._layer_input = self._hidden / (layout.tensor if config.distribute_saved_activations else 1)
        # The rows that the experts of this rank get.
        self._row = (config.moe_latent_size or config.hidden_size) * self._element
        self._num_rows = self._shard * experts_per_token * layout.expert_tensor
        self._expert_channels = self._num_rows * (config.moe_ffn_hidden_size or 0) / layout.expert_tensor
        # An MLP keeps inputs and output of its activation function. Without fusion, the product of a gated MLP keeps
        # both halves once more: one activated, the other with an offset.
        is_fused = self._fused or config.bias_activation_fusion or is_plain_swiglu(config)
        self._mlp_channel = (2 if not config.gated_linear_unit else 3 if is_fused else 5) * self._element
        # A layer keeps these bytes in proportion to the number of rows on this rank's experts. Without fusion, the
        # output of the activation function is multiplied by the weight of each token.
        per_channel = self._mlp_channel + (0 if is_fused else self._element)
        self._expert_bytes = self._num_rows * self._row + self._expert_channels * per_channel
        self._dropped = config.recompute_modules or () if config.recompute_granularity == "selective" else ()
        attention, dense_mlp = self._attention(), _Tensors(self._mlp(config.ffn_hidden_size), ("mlp",))
        self._dense, self._moe = self._layer([*attention, dense_mlp]), self._layer([*attention, *self._experts()])

    def of_stage(self, stage: int, chunks: Sequence[Chunk]) -> dict[str, int]:
        """Return the estimated bytes of a rank of a pipeline stage, by the names of `StageMemory`."""
        in_flight = self._layout.micro_batches_in_flight(stage)
        moe_layers = sum(chunk.moe_layers + chunk.mtp_layers for chunk in chunks) if self._config.num_moe_experts else 0
        # The rows before and after the two exchanges of a layer are freed afterwards. The backward pass needs as many
        # bytes as the forward pass.
        received = self._num_rows * self._row
        dispatched = 2 * (self._row * self._shard * self.experts_per_token + received)
        # If the rows double, all layers whose experts keep their tensors grow, else the layer that is recomputed.
        is_kept = self._config.recompute_granularity != "full" and "moe" not in self._dropped
        doubled_rows = (moe_layers * in_flight if is_kept else 1) * self._expert_bytes + 2 * received
        return {
            "activations": round(sum(map(self._kept, chunks)) * in_flight),
            "recomputation": round(max(map(self._recomputed_at_once, chunks))),
            "logits": round(max(map(self._logits, chunks))),
            "dispatch": round(dispatched) if moe_layers else 0,
            "doubled_rows": round(doubled_rows) if moe_layers else 0,
        }

    def _recomputed_at_once(self, chunk: Chunk) -> float:
        """Return the bytes that the backward pass of a model chunk recomputes at one time."""
        config = self._config
        if config.recompute_granularity == "full":
            layers = 1 if config.recompute_method == "block" else min(config.recompute_num_layers or 1, chunk.layers)
            return layers * self._mean_layer(chunk)
        return max(self._dense.recomputed, self._moe.recomputed if chunk.moe_layers or chunk.mtp_layers else 0)

    def _logits(self, chunk: Chunk) -> float:
        """Return the bytes of the logits of all outputs, which the gradients overwrite.

        With `cross_entropy_loss_fusion`, return the bytes of the logits of one output, and of the fp32 exponentials of
        the losses of all outputs.
        """
        elements = self._tokens * self._padded_vocab / self._layout.tensor if chunk.has_output else 0
        if self._config.cross_entropy_loss_fusion:
            return (1 + chunk.mtp_layers) * elements * _FP32_BYTES + elements * self._element
        return (1 + chunk.mtp_layers) * elements * self._element

    def _kept(self, chunk: Chunk) -> float:
        """Return the bytes that a model chunk keeps of one micro-batch until its backward pass."""
        if self._config.recompute_granularity == "full":
            group = self._config.recompute_num_layers or 1
            if self._config.recompute_method == "block":
                recomputed = min(group, chunk.layers)
                kept = recomputed * self._layer_input + (chunk.layers - recomputed) * self._mean_layer(chunk)
            else:
                kept = -(-chunk.layers // group) * self._layer_input
            kept += chunk.mtp_layers * self._layer_input
        else:
            kept = chunk.dense_layers * self._dense.kept + chunk.moe_layers * self._moe.kept
            kept += chunk.mtp_layers * (self._moe if chunk.moe_layers else self._dense).kept
        # Multi-token prediction concatenates the outputs of two norms. Before each output there is a norm.
        norms = 2 * chunk.mtp_layers + (1 + chunk.mtp_layers if chunk.has_output else 0)
        kept += norms * 2 * self._hidden
        return kept + (self._tokens * _ID_BYTES + self._dropout_mask if chunk.has_embedding else 0)

    def _mean_layer(self, chunk: Chunk) -> float:
        """Return the bytes that the backward pass of a layer reads, averaged over the layers of a chunk."""
        dense, moe = sum(self._dense), sum(self._moe)
        if not chunk.layers:
            return moe if chunk.mtp_layers else 0
        return (chunk.dense_layers * dense + chunk.moe_layers * moe) / chunk.layers

    def _layer(self, tensors: Sequence[_Tensors]) -> _Layer:
        """Add up the tensors of a layer."""
        recomputed = sum(size for size, dropped_by in tensors if not set(dropped_by).isdisjoint(self._dropped))
        return _Layer(sum(size for size, _ in tensors) - recomputed, recomputed)

    def _attention(self) -> list[_Tensors]:
        """Return the tensors of attention, of the two norms of a layer, and of its two residual additions."""
        config = self._config
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        # The bytes of one channel of queries, keys or values.
        channel = self._tokens / self._layout.tensor * self._element
        if isinstance(config, MLATransformerConfig):
            sizes = _HeadSizes(heads, heads, config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim)
            projected = heads * config.v_head_dim
            # The compressed queries and keys are kept before and after their norms.
            compressed = (config.q_lora_rank or 0) + config.kv_lora_rank
            kept_twice = compressed if config.qk_layernorm else 0
            before_norms = (compressed + kept_twice + config.qk_pos_emb_head_dim) * self._shard * self._element
            if config.qk_layernorm and config.q_lora_rank is None:
                before_norms += self._hidden  # queries are projected from hidden states that are normalized again
        else:
            width = config.kv_channels or 0  # `TransformerConfig` derives a missing number
            sizes = _HeadSizes(heads, groups, width, width)
            projected = (heads + 2 * groups) * width
            before_norms = (heads + groups) * width * channel if config.qk_layernorm else 0
        inputs, made = self._core_attention(sizes, projected)
        output = heads * sizes.value_width * channel
        gate = 2 * output if config.attention_output_gate else 0
        return [
            # The inputs of the norms are the hidden states before attention and before the MLP.
            _Tensors(2 * (self._hidden + self._dropout_mask)),
            _Tensors(2 * self._hidden, ("layernorm",)),
            _Tensors(inputs * channel, ("mla_up_proj",)),
            _Tensors(before_norms + output + gate),
            _Tensors(made * channel + self._scores, ("core_attn",)),
        ]

    def _core_attention(self, sizes: _HeadSizes, projected: int) -> tuple[float, float]:
        """Return the channels of a token that are kept of the inputs of core attention, and of the tensors it makes.

        Args:
            sizes: the sizes of queries, keys and values.
            projected: channels of the projection's output of which the values are a view.
        """
        config, (heads, groups, key_width, value_width) = self._config, sizes
        made = heads * _FP32_BYTES / self._element  # statistics of softmax
        makes_queries = makes_keys = makes_values = False
        if not self._fused:
            # Torch's kernels want values as wide as keys, and a softmax offset takes one more channel, see
            # `TorchDotProductAttention`. A kernel for GPUs that takes a bias, or fp32, repeats keys and values.
            width = padded_width(key_width, value_width, has_offset=config.softmax_type != "vanilla")
            has_bias = self._gives_mask or config.window_size or self._element == _FP32_BYTES
            repeats = heads // groups if has_bias and not self._is_on_cpu else 1
            gathered = self._layout.context
            makes_queries = width > key_width
            makes_keys = makes_queries or gathered * repeats > 1
            makes_values = width > value_width or gathered * repeats > 1
            made += heads * width * makes_queries + groups * repeats * width * gathered * (makes_keys + makes_values)
            # Outputs of blocks of queries are concatenated, and the channels of wider outputs are cut off.
            has_blocks = gathered > 1 or (
                config.window_size and self._sequence > max(config.window_size[0], SHORTEST_BLOCK)
            )
            made += heads * width if has_blocks or width > value_width else 0
        # Recomputation keeps all inputs; otherwise an input that core attention replaces is not kept.
        replaces = "core_attn" not in self._dropped
        is_rotated = self._rotates or isinstance(config, MLATransformerConfig)  # rotated inputs are new tensors
        inputs = 0
        inputs += heads * key_width if is_rotated and not (replaces and makes_queries) else 0
        inputs += groups * key_width if is_rotated and not (replaces and makes_keys) else 0
        is_view_replaced = makes_values and (is_rotated or (makes_queries and makes_keys))
        inputs += projected if not (replaces and is_view_replaced) else 0
        return inputs, made

    @property
    def _scores(self) -> float:
        """Return the bytes that local attention keeps for each pair of a query and a key.

        A given mask is kept as a bias for all heads. Torch's kernel for CPUs has no dropout, so weights before and
        after dropout and the factors of dropout are kept in fp32.
        """
        if self._fused:
            return 0
        pairs = self._layout.micro_batch * self._sequence * self._layout.seq_length
        per_pair = self._element if self._gives_mask else 0
        if self._config.attention_dropout and self._is_on_cpu:
            per_pair = 3 * _FP32_BYTES * self._config.num_attention_heads / self._layout.tensor
        return pairs * per_pair

    def _mlp(self, inner_size: int | None) -> float:
        """Return the bytes of an MLP that computes all tokens."""
        return self._tokens * (inner_size or 0) / self._layout.tensor * self._mlp_channel

    def _experts(self) -> list[_Tensors]:
        """Return the tensors of router, permutation, routed experts and shared experts; none without experts."""
        if not self._config.num_moe_experts:
            return []
        # Scores for routing and for the load-balancing loss, bool maps, and the indices that permute the rows.
        router = self._shard * self._config.num_moe_experts * (2 * _FP32_BYTES + 2)
        router += 5 * self._shard * self.experts_per_token * _ID_BYTES
        latent = self._shard * self._row if self._config.moe_latent_size else 0
        # Recomputation of the activation function keeps its input.
        activated = self._expert_bytes - self._num_rows * self._row
        activated -= self._expert_channels * (2 if self._config.gated_linear_unit else 1) * self._element
        return [
            _Tensors(router + latent + self._expert_bytes - activated, ("moe",)),
            _Tensors(activated, ("moe", "moe_act")),
            _Tensors(self._mlp(self._config.moe_shared_expert_intermediate_size), ("moe", "shared_experts")),
        ]
