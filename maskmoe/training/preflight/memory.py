"""Computes the memory of one rank of each pipeline stage, by purpose: exact, but for estimated activations.

The terms of the activations follow the forward pass of Megatron-Core's modules: the tensors that each part of a layer
keeps for its backward pass. Korthikanti et al., arXiv 2205.05198, section 4, derive them for layers without experts.
Attention is assumed to be a fused kernel, which keeps no scores. Transformer Engine's modules fuse norms and all
activation functions; the local modules fuse some. The estimate assumes that all experts get the same number of rows.
The inner activations of Mamba layers and gated delta nets are left out.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from typing import NamedTuple

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.parameters import Chunk, ModelParameters

# The purposes of memory, with their names in the printed report. `_Activations` estimates the second group.
EXACT = {
    "weights": "weights and buffers",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "routing_mask": "routing mask",
}
ESTIMATED = {
    "activations": "activations in flight",
    "recomputation": "recomputed at one time",
    "logits": "logits and cross entropy",
    "dispatch": "rows being dispatched",
}
_FP32_BYTES = 4
_ID_BYTES = 8
# The moments that Adam keeps for a parameter. Other optimizers keep at most as much.
_MOMENTS = ("exp_avg_dtype", "exp_avg_sq_dtype")


@dataclass(frozen=True)
class StageMemory:
    """The memory of one rank of a pipeline stage, in bytes.

    Weights (with buffers), gradients and the routing mask are exact. The optimizer is exact as a mean: the distributed
    optimizer pads its buckets, so its ranks differ by the padding.

    Attributes:
        weights, gradients, optimizer, routing_mask: Bytes that are allocated once and kept.
        activations: Bytes that the backward passes of all micro-batches in flight will read.
        recomputation: Bytes of all activations of the layers that are recomputed at one time.
        logits: Bytes of the logits of one micro-batch, and of their softmax if the loss keeps it.
        dispatch: Bytes of the rows that a layer sends to experts and gets back.
        micro_batches_in_flight: The largest number of micro-batches with kept activations.
    """

    weights: int
    gradients: int
    optimizer: int
    routing_mask: int
    activations: int
    recomputation: int
    logits: int
    dispatch: int
    micro_batches_in_flight: float

    @property
    def total(self) -> int:
        """Return the sum of all bytes."""
        return sum(getattr(self, purpose) for purpose in EXACT | ESTIMATED)


@dataclass(frozen=True)
class MemoryReport:
    """The memory of a run.

    Attributes:
        stages: One rank of each pipeline stage.
        rows_per_token: Mean number of rows that a token has on experts.
    """

    stages: tuple[StageMemory, ...]
    rows_per_token: float

    @property
    def largest_stage(self) -> int:
        """Return the number of the pipeline stage that needs most memory, from 0."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)


def compute_memory(args: Namespace, config: TransformerConfig, model: ModelParameters) -> MemoryReport:
    """Compute the memory of one rank of every pipeline stage.

    Args:
        args: Arguments that Megatron has validated.
        config: The model's configuration.
        model: The parameters of the stages.
    """
    layout = Layout.from_args(args)
    rows_per_token = model.mean_experts
    if args.moe_pad_expert_input_to_capacity:
        rows_per_token = args.moe_router_topk * args.moe_expert_capacity_factor
    activations = _Activations(args, config, layout, rows_per_token)
    weight, gradient, optimizer = bytes_of_parameter(args)
    # The number of ranks among which the optimizer is divided, for dense parameters and for experts.
    share = expert_share = 1
    if args.use_distributed_optimizer or args.use_layer_wise_distributed_optimizer:
        share = layout.data * layout.context // args.num_distributed_optimizer_instances
        expert_share = layout.expert_data // args.num_distributed_optimizer_instances
    stages = []
    for stage, chunks in enumerate(model.stages):
        experts = sum(chunk.expert_parameters for chunk in chunks)
        dense = sum(chunk.num_parameters for chunk in chunks) - experts
        memory = StageMemory(
            weights=(dense + experts) * weight + sum(chunk.buffer_bytes for chunk in chunks),
            gradients=(dense + experts) * gradient,
            optimizer=-(-dense * optimizer // share) - (-experts * optimizer // expert_share),
            routing_mask=model.mask_bytes * len(chunks),
            micro_batches_in_flight=micro_batches_in_flight(layout, stage),
            **activations.of_stage(stage, chunks),
        )
        stages.append(memory)
    return MemoryReport(tuple(stages), rows_per_token)


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Return the largest number of micro-batches whose backward pass a pipeline stage still has to compute.

    The schedule is one-forward-one-backward (`megatron.core.pipeline_parallel.schedules`). In an interleaved pipeline
    the result is the mean over the chunks of the stage.
    """
    stages_after, chunks = layout.pipeline - stage - 1, layout.virtual_pipeline
    if chunks == 1:
        return min(layout.micro_batches, stages_after + 1)
    warm_up = 2 * stages_after + (chunks - 1) * layout.micro_batch_group + 1
    return min(layout.micro_batches * chunks, warm_up) / chunks


def bytes_of_parameter(args: Namespace) -> tuple[int, int, int]:
    """Return the bytes of a parameter, of its gradient, and of its state in the optimizer.

    These are the bytes that Megatron's `DistributedDataParallel` and optimizers allocate for bf16, fp16 or fp32. The
    state consists of moments, and of a main copy unless the parameter is fp32.
    """
    weight = args.params_dtype.itemsize
    if args.use_precision_aware_optimizer:
        main = args.main_params_dtype.itemsize
        if args.bf16 and args.main_params_dtype == torch.float32:
            # No flag turns `store_param_remainders` off: the main copy holds only the bits that bf16 lacks.
            main -= weight
        moments = sum(getattr(args, name).itemsize for name in _MOMENTS)
    else:
        main = _FP32_BYTES if weight < _FP32_BYTES else 0
        moments = _FP32_BYTES * len(_MOMENTS)
    return weight, _FP32_BYTES if args.accumulate_allreduce_grads_in_fp32 else weight, main + moments


# ---- Activations -----------------------------------------------------------------------------------------------------


class _Tensors(NamedTuple):
    """Tensors of a layer that the backward pass reads.

    Attributes:
        size: The bytes of the tensors.
        dropped_by: Names in `--recompute-modules`; each of these drops the tensors after the forward pass.
    """

    size: float
    dropped_by: tuple[str, ...] = ()


class _Activations:
    """Estimates the activations of one micro-batch on one rank, in bytes.

    Args:
        args: Arguments that Megatron has validated.
        config: The model's configuration.
        layout: How the run is divided.
        rows_per_token: Mean number of rows that a token has on experts.
    """

    def __init__(self, args: Namespace, config: TransformerConfig, layout: Layout, rows_per_token: float) -> None:
        self._rows_per_token = rows_per_token
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
        self._num_rows = self._shard * rows_per_token * layout.expert_tensor
        # An MLP keeps inputs and output of its activation function. Without fusion, the product of a gated MLP keeps
        # both halves once more: one activated, the other with an offset.
        self._fuses_mlp = self._fused or config.bias_activation_fusion
        self._mlp_channel = (2 if not config.gated_linear_unit else 3 if self._fuses_mlp else 5) * self._element
        # The bytes of the layer of each symbol that are kept, and those that selective recomputation computes again.
        dropped = set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()
        self._kept_of, self._recomputed_of = dict[str, float](), dict[str, float]()
        for symbol, tensors in self._tensors_of_symbols().items():
            self._recomputed_of[symbol] = sum(size for size, names in tensors if dropped.intersection(names))
            self._kept_of[symbol] = sum(size for size, _ in tensors) - self._recomputed_of[symbol]

    def of_stage(self, stage: int, chunks: Sequence[Chunk]) -> dict[str, int]:
        """Return the estimated bytes of a rank of a pipeline stage, by the names of `StageMemory`."""
        in_flight = micro_batches_in_flight(self._layout, stage)
        # The rows before and after the two exchanges of a layer are freed afterwards. The backward pass needs as many
        # bytes as the forward pass.
        has_experts = any(chunk.num_moe_layers for chunk in chunks)
        dispatched = 2 * self._row * (self._shard * self._rows_per_token + self._num_rows) if has_experts else 0
        return {
            "activations": round(sum(map(self._kept, chunks)) * in_flight),
            "recomputation": round(max(map(self._recomputed_at_once, chunks))),
            "logits": round(max(map(self._logits, chunks))),
            "dispatch": round(dispatched),
        }

    def _kept(self, chunk: Chunk) -> float:
        """Return the bytes that a model chunk keeps of one micro-batch until its backward pass."""
        if self._config.recompute_granularity == "full":
            recomputed, remaining = self._recomputed_groups(chunk)
            kept = len(recomputed) * self._layer_input + self._read_by_backward("".join(remaining))
        else:
            kept = sum(self._kept_of[symbol] for symbol in "".join(chunk.layers + chunk.predictions))
        # Multi-token prediction concatenates the outputs of two norms. Before each output there is a norm.
        norms = 2 * len(chunk.predictions) + (1 + len(chunk.predictions) if chunk.has_output else 0)
        kept += norms * 2 * self._hidden
        return kept + (self._tokens * _ID_BYTES + self._dropout_mask if chunk.has_embedding else 0)

    def _recomputed_at_once(self, chunk: Chunk) -> float:
        """Return the bytes that the backward pass of a model chunk recomputes at one time."""
        if self._config.recompute_granularity == "full":
            recomputed, _ = self._recomputed_groups(chunk)
            return max((self._read_by_backward("".join(group)) for group in recomputed), default=0)
        symbols = "".join(chunk.layers + chunk.predictions)
        return max((self._recomputed_of[symbol] for symbol in symbols), default=0)

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

    def _read_by_backward(self, symbols: str) -> float:
        """Return the bytes that the backward pass of some layers reads."""
        return sum(self._kept_of[symbol] + self._recomputed_of[symbol] for symbol in symbols)

    def _logits(self, chunk: Chunk) -> float:
        """Return the bytes of the logits of all outputs, which the gradients overwrite.

        With `cross_entropy_loss_fusion`, return the bytes of the logits of one output, and of the fp32 exponentials of
        the losses of all outputs.
        """
        outputs = 1 + len(chunk.predictions)
        elements = self._tokens * self._padded_vocab / self._layout.tensor if chunk.has_output else 0
        if self._config.cross_entropy_loss_fusion:
            return outputs * elements * _FP32_BYTES + elements * self._element
        return outputs * elements * self._element

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
        config = self._config
        if not config.num_moe_experts:
            return []
        # Scores for routing and for the load-balancing loss, bool maps, and the indices that permute the rows.
        router = self._shard * config.num_moe_experts * (2 * _FP32_BYTES + 2)
        router += 5 * self._shard * self._rows_per_token * _ID_BYTES
        latent = self._shard * self._row if config.moe_latent_size else 0
        # Recomputation of the activation function keeps its input. Without fusion, the output of the activation
        # function is multiplied by the weight of each token.
        channels = self._num_rows * (config.moe_ffn_hidden_size or 0) / self._layout.expert_tensor
        before = (2 if config.gated_linear_unit else 1) * self._element
        after = self._mlp_channel - before + (0 if self._fuses_mlp else self._element)
        return [
            _Tensors(router + latent + self._num_rows * self._row + channels * before, ("moe",)),
            _Tensors(channels * after, ("moe", "moe_act")),
            _Tensors(self._mlp(config.moe_shared_expert_intermediate_size), ("moe", "shared_experts")),
        ]
