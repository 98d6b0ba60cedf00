"""Estimates the bytes of activations from the tensors that each part of a layer keeps for its backward pass.

The terms follow the forward pass of Megatron-Core's modules. Korthikanti et al., arXiv 2205.05198, section 4, derive
them for layers without experts. Transformer Engine's modules keep no attention scores, and fuse norms and activation
functions; the local modules keep more. The estimate assumes that all experts get the same number of rows.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from maskmoe.check.layout import Layout
from maskmoe.check.parameters import Chunk

_FP32_BYTES = 4
_ID_BYTES = 8


@dataclass(frozen=True)
class ActivationModel:
    """Estimates the activations of one micro-batch on one rank, in bytes.

    Attributes:
        config: the model's configuration.
        padded_vocab: number of rows of the output layer.
        micro_batch: number of samples in a micro-batch.
        sequence: number of tokens of a sample on one context-parallel rank.
        tensor, expert_tensor: tensor parallel sizes.
        experts_per_token: mean number of experts that a token is sent to.
        rotates: whether queries and keys are rotated by their position.
        fused: whether norms, attention and activation functions are the fused kernels of Transformer Engine.
    """

    config: TransformerConfig
    padded_vocab: int
    micro_batch: int
    sequence: int
    tensor: int
    expert_tensor: int
    experts_per_token: float
    rotates: bool
    fused: bool

    @classmethod
    def from_args(
        cls, args: Namespace, config: TransformerConfig, layout: Layout, experts_per_token: float
    ) -> "ActivationModel":
        """Return the estimator for a run.

        Args:
            args: arguments that Megatron has validated.
            config: the model's configuration.
            layout: how the run is divided.
            experts_per_token: mean number of experts that a token is sent to. If experts are padded to their capacity,
                the capacity takes its place.
        """
        if args.moe_pad_expert_input_to_capacity:
            experts_per_token = args.moe_router_topk * args.moe_expert_capacity_factor
        return cls(
            config=config,
            padded_vocab=args.padded_vocab_size,
            micro_batch=layout.micro_batch,
            sequence=layout.seq_length // layout.context,
            tensor=layout.tensor,
            expert_tensor=layout.expert_tensor,
            experts_per_token=experts_per_token,
            rotates=args.position_embedding_type in ("rope", "mrope", "yarn"),
            fused=args.transformer_impl == "transformer_engine",
        )

    def in_flight(self, layout: Layout, stage: int, chunks: Sequence[Chunk]) -> int:
        """Return the bytes that a stage keeps of all micro-batches whose backward pass is still to come."""
        per_micro_batch = sum(self.kept(chunk) for chunk in chunks)
        return round(per_micro_batch * micro_batches_in_flight(layout, stage))

    def kept(self, chunk: Chunk) -> float:
        """Return the bytes that a model chunk keeps of one micro-batch until its backward pass."""
        layers = chunk.layers
        if self.config.recompute_granularity == "full":
            group = self.config.recompute_num_layers or 1
            if self.config.recompute_method == "block":
                recomputed = min(group, layers)
                kept = recomputed * self._layer_input + (layers - recomputed) * self._mean_layer(chunk)
            else:
                kept = -(-layers // group) * self._layer_input
            kept += chunk.mtp_layers * self._layer_input
        else:
            kept = chunk.dense_layers * self._layer(moe=False) + chunk.moe_layers * self._layer(moe=True)
            kept += chunk.mtp_layers * self._layer(moe=bool(chunk.moe_layers))
        # Multi-token prediction concatenates the outputs of two norms and projects the result to the hidden size.
        kept += chunk.mtp_layers * 2 * (self._norm_input + self._hidden)
        if chunk.has_embedding:
            kept += self._tokens * _ID_BYTES + self._dropout_mask
        if chunk.has_output:
            # The final norm keeps its input and its output.
            kept += (1 + chunk.mtp_layers) * (self._norm_input + self._hidden)
        return kept

    def recomputed_at_once(self, chunk: Chunk) -> int:
        """Return the bytes that the backward pass of a model chunk recomputes at one time."""
        config = self.config
        if config.recompute_granularity == "full":
            layers = 1 if config.recompute_method == "block" else min(config.recompute_num_layers or 1, chunk.layers)
            return round(layers * self._mean_layer(chunk))
        if config.recompute_granularity == "selective":
            kinds = {False, self._has_experts(chunk)}
            return round(max(self._recomputed(moe) for moe in kinds))
        return 0

    def logits(self, chunk: Chunk) -> int:
        """Return the bytes of the logits of one output, and of the fp32 exponentials of the losses of all outputs."""
        if not chunk.has_output:
            return 0
        elements = self._tokens * self.padded_vocab / self.tensor
        return round((1 + chunk.mtp_layers) * elements * _FP32_BYTES + elements * self._element)

    def dispatch(self) -> int:
        """Return the bytes of the rows before and after the two exchanges of a layer.

        The rows are freed afterwards, and the backward pass needs as many bytes as the forward pass.
        """
        return round(2 * (self._hidden_per_row * self._shard * self.experts_per_token + self._expert_rows_bytes))

    def bytes_of_doubled_rows(self, layout: Layout, stage: int, chunks: Sequence[Chunk]) -> int:
        """Return how many more bytes a stage needs if its experts get twice their share of rows."""
        moe_layers = sum(chunk.moe_layers + chunk.mtp_layers for chunk in chunks if self._has_experts(chunk))
        if not moe_layers:
            return 0
        is_kept = self.config.recompute_granularity != "full" and not self._recomputes("moe")
        layers = moe_layers * micro_batches_in_flight(layout, stage) if is_kept else 1
        return round(layers * self._expert_bytes + 2 * self._expert_rows_bytes)

    @property
    def _expert_width(self) -> float:
        """Return the inner size of an expert on one expert-tensor-parallel rank."""
        # Without experts there is no width.
        return (self.config.moe_ffn_hidden_size or 0) / self.expert_tensor

    @property
    def _head_width(self) -> int:
        """Return the channels of one attention head."""
        assert self.config.kv_channels is not None  # `TransformerConfig` derives a missing number from the hidden size
        return self.config.kv_channels

    def _has_experts(self, chunk: Chunk) -> bool:
        return bool(self.config.num_moe_experts and (chunk.moe_layers or chunk.mtp_layers))

    @property
    def _expert_bytes(self) -> float:
        """Return the bytes that a layer keeps in proportion to the number of rows on this rank's experts."""
        width = self._expert_width
        # The local experts multiply the output of the activation function by the weight of each token.
        weighing = 0 if self.fused else self._rows * width * self._element
        return self._expert_rows_bytes + self._rows * self._mlp_per_token(width) + weighing

    @property
    def _element(self) -> int:
        return self.config.params_dtype.itemsize

    @property
    def _tokens(self) -> int:
        return self.micro_batch * self.sequence

    @property
    def _shard(self) -> float:
        """Return the tokens of a rank between the parts of a layer, where sequence parallelism divides the sequence."""
        return self._tokens / self.tensor if self.config.sequence_parallel else self._tokens

    @property
    def _hidden(self) -> float:
        """Return the bytes of the hidden states between the parts of a layer."""
        return self._shard * self.config.hidden_size * self._element

    @property
    def _layer_input(self) -> float:
        """Return the bytes of the hidden states from which a layer can be recomputed."""
        divided = self.tensor if self.config.distribute_saved_activations else 1
        return self._hidden / divided

    @property
    def _dropout_mask(self) -> float:
        return self._shard * self.config.hidden_size if self.config.hidden_dropout else 0

    @property
    def _rows(self) -> float:
        """Return the number of rows that this rank's experts get."""
        return self._shard * self.experts_per_token * self.expert_tensor

    @property
    def _hidden_per_row(self) -> float:
        return (self.config.moe_latent_size or self.config.hidden_size) * self._element

    @property
    def _expert_rows_bytes(self) -> float:
        return self._rows * self._hidden_per_row

    def _recomputes(self, module: str) -> bool:
        return self.config.recompute_granularity == "selective" and module in (self.config.recompute_modules or ())

    def _mean_layer(self, chunk: Chunk) -> float:
        """Return the bytes that the backward pass of a layer reads, averaged over the layers of a chunk."""
        dense, moe = self._whole_layer(False), self._whole_layer(True)
        if not chunk.layers:
            return moe if chunk.mtp_layers else 0
        return (chunk.dense_layers * dense + chunk.moe_layers * moe) / chunk.layers

    def _whole_layer(self, moe: bool) -> float:
        return self._norms + self._attention + self._scores + (self._moe if moe else self._dense_mlp)

    def _layer(self, moe: bool) -> float:
        """Return the bytes that a layer keeps when selective recomputation drops some of its tensors."""
        return self._whole_layer(moe) - self._recomputed(moe)

    def _recomputed(self, moe: bool) -> float:
        """Return the bytes of a layer that selective recomputation drops."""
        dropped = self._scores if self._recomputes("core_attn") else 0
        if self._recomputes("layernorm"):
            dropped += 2 * self._hidden
        if self._recomputes("mla_up_proj"):
            dropped += self._query_key_value
        if not moe:
            return dropped + (self._dense_mlp if self._recomputes("mlp") else 0)
        if self._recomputes("moe"):
            return dropped + self._moe
        if self._recomputes("moe_act"):
            dropped += self._rows * self._expert_width * self._element
        return dropped + (self._shared_experts if self._recomputes("shared_experts") else 0)

    @property
    def _norms(self) -> float:
        """Return the bytes of the two norms, and of the dropouts before the two residual additions."""
        return 2 * (self._norm_input + self._hidden + self._dropout_mask)

    @property
    def _norm_input(self) -> float:
        """Return the bytes that a norm keeps besides its output."""
        if self.fused or self.config.normalization == "LayerNorm":
            return self._hidden
        # Torch's RMSNorm keeps its input in fp32, before and after the division by the root mean square.
        return 2 * self._shard * self.config.hidden_size * _FP32_BYTES

    @property
    def _query_key_value(self) -> float:
        """Return the bytes of queries, keys and values."""
        config = self.config
        heads = config.num_attention_heads
        groups = config.num_query_groups or heads
        if isinstance(config, MLATransformerConfig):
            width = heads * (2 * (config.qk_head_dim + config.qk_pos_emb_head_dim) + config.v_head_dim)
        elif not self.fused and groups < heads:
            # Local attention repeats keys and values for every head that shares them.
            width = 3 * heads * self._head_width
        else:
            # The values are a view of the projection's output, but rotated queries and keys are new tensors.
            rotated = heads + groups if self.rotates else 0
            width = (heads + 2 * groups + rotated) * self._head_width
        return self._tokens * width / self.tensor * self._element

    @property
    def _attention(self) -> float:
        """Return the bytes of attention without its scores.

        Queries, keys, values and the output are kept, and so are the inputs of the norms of queries and keys.
        """
        config = self.config
        heads = config.num_attention_heads
        before, value_width = 0.0, self._head_width
        if isinstance(config, MLATransformerConfig):
            value_width = config.v_head_dim
            compressed = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_pos_emb_head_dim
            # The compressed queries and keys are kept before and after their norms.
            before = 2 * self._shard * compressed * self._element
        elif config.qk_layernorm:
            width = (heads + (config.num_query_groups or heads)) * self._head_width
            before = self._tokens * width / self.tensor * self._element
        output = self._tokens * heads * value_width / self.tensor * self._element
        statistics = self._tokens * heads / self.tensor * _FP32_BYTES if self.fused else 0
        gate = 2 * output if config.attention_output_gate else 0
        return self._query_key_value + output + before + statistics + gate

    @property
    def _scores(self) -> float:
        """Return the bytes of the scores of local attention: after the softmax, after the cast, and after dropout."""
        if self.fused:
            return 0
        per_score = self._element
        if self.config.attention_softmax_in_fp32 and self._element < _FP32_BYTES:
            per_score += _FP32_BYTES
        if self.config.attention_dropout:
            per_score += 1 + self._element
        heads = self.config.num_attention_heads / self.tensor
        return self.micro_batch * heads * self.sequence**2 * per_score

    def _mlp_per_token(self, width: float) -> float:
        """Return the bytes that an MLP keeps of a token: the inputs and the output of its activation function."""
        if not self.config.gated_linear_unit:
            return 2 * width * self._element
        # Without fusion, the product keeps both halves once more: one activated, the other with an offset.
        return (3 if self.fused else 5) * width * self._element

    @property
    def _dense_mlp(self) -> float:
        assert self.config.ffn_hidden_size is not None  # `TransformerConfig` derives a missing size
        return self._tokens * self._mlp_per_token(self.config.ffn_hidden_size / self.tensor)

    @property
    def _shared_experts(self) -> float:
        width = self.config.moe_shared_expert_intermediate_size or 0
        return self._tokens * self._mlp_per_token(width / self.tensor)

    @property
    def _moe(self) -> float:
        """Return the bytes of router, permutation, routed experts and shared experts of a layer.

        A model without experts has no such bytes.
        """
        if not self.config.num_moe_experts:
            return 0.0
        # Scores for routing and for the load-balancing loss, bool maps, and the indices that permute the rows.
        router = self._shard * self.config.num_moe_experts * (2 * _FP32_BYTES + 2)
        router += 5 * self._shard * self.experts_per_token * _ID_BYTES
        latent = self._shard * self._hidden_per_row if self.config.moe_latent_size else 0
        return router + latent + self._expert_bytes + self._shared_experts


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """Return the largest number of micro-batches whose backward pass a pipeline stage still has to compute.

    The schedule is one-forward-one-backward (`megatron.core.pipeline_parallel.schedules`). In an interleaved pipeline
    each chunk of a stage has its own micro-batches in flight, and the result is their mean over the chunks.
    """
    stages_after = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(layout.num_micro_batches, stages_after + 1)
    chunks = layout.virtual_pipeline
    warm_up = 2 * stages_after + (chunks - 1) * layout.micro_batch_group + 1
    return min(layout.num_micro_batches * chunks, warm_up) / chunks
