"""Estimates the bytes of activations from the tensors that each part of a layer keeps for its backward pass.

The terms follow the forward pass of Megatron-Core's modules. Korthikanti et al., arXiv 2205.05198, section 4, derive
them for layers without experts. Attention is assumed to be a fused kernel, which keeps no scores. Transformer Engine's
modules fuse norms and all activation functions; the local modules fuse some. The estimate assumes that all experts get
the same number of rows. The inner activations of Mamba layers and gated delta nets are left out.
"""

from argparse import Namespace
from collections.abc import Sequence
from itertools import batched
from typing import NamedTuple

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from maskmoe.training.preflight.parameters import Chunk
from maskmoe.training.settings.layout import Layout
from maskmoe.transformer.torch_modules.mlp import is_plain_swiglu

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
        self._layer_of_symbol = {symbol: self._layer(tensors) for symbol, tensors in self._tensors_of_symbols().items()}

    def of_stage(self, stage: int, chunks: Sequence[Chunk]) -> dict[str, int]:
        """Return the estimated bytes of a rank of a pipeline stage, by the names of `StageMemory`."""
        in_flight = self._layout.micro_batches_in_flight(stage)
        moe_layers = sum(chunk.num_moe_layers for chunk in chunks)
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
        if self._config.recompute_granularity == "full":
            recomputed, _ = self._recomputed_groups(chunk)
            return max((self._read_by_backward("".join(group)) for group in recomputed), default=0)
        symbols = "".join(chunk.layers + chunk.predictions)
        return max((self._layer_of_symbol[symbol].recomputed for symbol in symbols), default=0)

    def _recomputed_groups(self, chunk: Chunk) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
        """Divide the layers of a model chunk for full recomputation.

        Returns:
            The groups of layers that are recomputed from the input of the group, and the remaining layers.
        """
        number, layers = self._config.recompute_num_layers or 1, chunk.layers
        groups, remaining = batched(layers, number), ()
        if self._config.recompute_method == "block":
            groups, remaining = batched(layers[:number], 1), layers[number:]
        return [*groups, *batched(chunk.predictions, 1)], remaining

    def _logits(self, chunk: Chunk) -> float:
        """Return the bytes of the logits of all outputs, which the gradients overwrite.

        With `cross_entropy_loss_fusion`, return the bytes of the logits of one output, and of the fp32 exponentials of
        the losses of all outputs.
        """
        elements = self._tokens * self._padded_vocab / self._layout.tensor if chunk.has_output else 0
        if self._config.cross_entropy_loss_fusion:
            return (1 + len(chunk.predictions)) * elements * _FP32_BYTES + elements * self._element
        return (1 + len(chunk.predictions)) * elements * self._element

    def _kept(self, chunk: Chunk) -> float:
        """Return the bytes that a model chunk keeps of one micro-batch until its backward pass."""
        if self._config.recompute_granularity == "full":
            recomputed, remaining = self._recomputed_groups(chunk)
            kept = len(recomputed) * self._layer_input + self._read_by_backward("".join(remaining))
        else:
            kept = sum(self._layer_of_symbol[symbol].kept for symbol in "".join(chunk.layers + chunk.predictions))
        # Multi-token prediction concatenates the outputs of two norms. Before each output there is a norm.
        norms = 2 * len(chunk.predictions) + (1 + len(chunk.predictions) if chunk.has_output else 0)
        kept += norms * 2 * self._hidden
        return kept + (self._tokens * _ID_BYTES + self._dropout_mask if chunk.has_embedding else 0)

    def _read_by_backward(self, symbols: str) -> float:
        """Return the bytes that the backward pass of some layers reads."""
        return sum(sum(self._layer_of_symbol[symbol]) for symbol in symbols)

    def _tensors_of_symbols(self) -> dict[str, list[_Tensors]]:
        """Return the tensors of the layer of each symbol, with the layer's norm and residual addition."""
        attention, mlp = self._attention(), _Tensors(self._mlp(self._config.ffn_hidden_size), ("mlp",))
        parts = {
            Symbols.ATTENTION: attention,
            Symbols.MLA: attention,
            Symbols.GDN: [],
            Symbols.MLP: [mlp],
            Symbols.MOE: self._experts(),
            Symbols.MAMBA: [],
        }
        # The input of the norm is the hidden states before the layer.
        around = [_Tensors(self._hidden + self._dropout_mask), _Tensors(self._hidden, ("layernorm",))]
        return {symbol: [*around, *tensors] for symbol, tensors in parts.items()}

    def _layer(self, tensors: Sequence[_Tensors]) -> _Layer:
        """Add up the tensors of a layer."""
        recomputed = sum(size for size, dropped_by in tensors if not set(dropped_by).isdisjoint(self._dropped))
        return _Layer(sum(size for size, _ in tensors) - recomputed, recomputed)

    def _attention(self) -> list[_Tensors]:
        """Return the tensors of attention by a fused kernel, which keeps no scores."""
        config = self._config
        heads, groups = config.num_attention_heads, config.num_query_groups or config.num_attention_heads
        # The bytes of one channel of queries, keys or values.
        channel = self._tokens / self._layout.tensor * self._element
        if isinstance(config, MLATransformerConfig):
            key_width, value_width, groups = config.qk_head_dim + config.qk_pos_emb_head_dim, config.v_head_dim, heads
            # The compressed queries and keys are kept before and after their norms.
            compressed = (config.q_lora_rank or 0) + config.kv_lora_rank
            kept_twice = compressed if config.qk_layernorm else 0
            before_norms = (compressed + kept_twice + config.qk_pos_emb_head_dim) * self._shard * self._element
            if config.qk_layernorm and config.q_lora_rank is None:
                before_norms += self._hidden  # queries are projected from hidden states that are normalized again
            projected = groups * value_width
        else:
            key_width = value_width = config.kv_channels or 0  # `TransformerConfig` derives a missing number
            before_norms = (heads + groups) * key_width * channel if config.qk_layernorm else 0
            projected = (heads + 2 * groups) * key_width
        # Rotated queries and keys are new tensors. Values are a view of the projection's output, which is kept whole.
        is_rotated = self._rotates or isinstance(config, MLATransformerConfig)
        inputs = projected + ((heads + groups) * key_width if is_rotated else 0)
        output = heads * value_width * channel
        mask = self._layout.micro_batch * self._sequence * self._layout.seq_length * self._element
        statistics = heads * _FP32_BYTES * self._tokens / self._layout.tensor
        return [
            _Tensors(inputs * channel, ("mla_up_proj",)),
            _Tensors(before_norms + output * (3 if config.attention_output_gate else 1)),
            _Tensors(statistics + (mask if self._gives_mask else 0), ("core_attn",)),
        ]

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
