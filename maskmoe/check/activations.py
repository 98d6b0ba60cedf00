"""Estimates the bytes of activations, from what each part of a layer keeps for its backward pass.

The terms follow the forward pass of Megatron-Core's modules (compare Korthikanti et al., arXiv 2205.05198, section 4,
which has no experts). With Transformer Engine, attention scores are not kept, and norms and activation functions are
fused; the local modules keep more. All experts are taken to get the same number of rows.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from maskmoe.check.layout import Layout
from maskmoe.check.parameters import Chunk

_FP32_BYTES = 4
_ID_BYTES = 8


@dataclass(frozen=True)
class ActivationModel:
    """Bytes of activations of one micro-batch on one rank.

    Attributes:
        config: the model's configuration.
        padded_vocab: size of the vocabulary in the output layer.
        micro_batch: samples.
        sequence: tokens of a sample on this context-parallel rank.
        tensor, expert_tensor: tensor parallel sizes.
        experts_per_token: experts that a token is sent to, on average.
        rotates: queries and keys are rotated by their position.
        fused: norms, attention and activation functions are fused kernels, those of Transformer Engine.
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
        """The activations of a run.

        Args:
            args: validated by Megatron.
            experts_per_token: on average; experts that are padded to their capacity get that many rows instead.
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
        """What a stage keeps of all micro-batches whose backward pass is still to come."""
        per_micro_batch = sum(self.kept(chunk) for chunk in chunks)
        return round(per_micro_batch * micro_batches_in_flight(layout, stage))

    def kept(self, chunk: Chunk) -> float:
        """What a model chunk keeps of one micro-batch until its backward pass."""
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
        # Multi-token prediction: two norms, and their concatenation, which is projected to the hidden size.
        kept += chunk.mtp_layers * 2 * (self._norm_input + self._hidden)
        if chunk.has_embedding:
            kept += self._tokens * _ID_BYTES + self._dropout_mask
        if chunk.has_output:
            # Input and output of the final norm.
            kept += (1 + chunk.mtp_layers) * (self._norm_input + self._hidden)
        return kept

    def recomputed_at_once(self, chunk: Chunk) -> int:
        """What the backward pass recomputes at one time."""
        config = self.config
        if config.recompute_granularity == "full":
            layers = 1 if config.recompute_method == "block" else min(config.recompute_num_layers or 1, chunk.layers)
            return round(layers * self._mean_layer(chunk))
        if config.recompute_granularity == "selective":
            kinds = {False, self._has_experts(chunk)}
            return round(max(self._recomputed(moe) for moe in kinds))
        return 0

    def logits(self, chunk: Chunk) -> int:
        """Logits, and the exponentials of the cross entropy in fp32; one of the model's outputs at a time is kept."""
        if not chunk.has_output:
            return 0
        elements = self._tokens * self.padded_vocab / self.tensor
        return round((1 + chunk.mtp_layers) * elements * _FP32_BYTES + elements * self._element)

    def dispatch(self) -> int:
        """Rows before and after each of the two exchanges, forward and backward alike, that are not kept."""
        return round(2 * (self._hidden_per_row * self._shard * self.experts_per_token + self._expert_rows_bytes))

    def bytes_of_doubled_rows(self, layout: Layout, stage: int, chunks: Sequence[Chunk]) -> int:
        """How much more a stage needs if its experts get twice their share of rows."""
        moe_layers = sum(chunk.moe_layers + chunk.mtp_layers for chunk in chunks if self._has_experts(chunk))
        if not moe_layers:
            return 0
        is_kept = self.config.recompute_granularity != "full" and not self._recomputes("moe")
        layers = moe_layers * micro_batches_in_flight(layout, stage) if is_kept else 1
        return round(layers * self._expert_bytes + 2 * self._expert_rows_bytes)

    def _has_experts(self, chunk: Chunk) -> bool:
        return bool(self.config.num_moe_experts and (chunk.moe_layers or chunk.mtp_layers))

    @property
    def _expert_bytes(self) -> float:
        """The part of a layer that grows with the number of rows on this rank's experts."""
        config = self.config
        width = config.moe_ffn_hidden_size / self.expert_tensor
        # A token's weight multiplies what the activation function gives.
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
        """Tokens where the sequence is divided among tensor-parallel ranks."""
        return self._tokens / self.tensor if self.config.sequence_parallel else self._tokens

    @property
    def _hidden(self) -> float:
        """Hidden states between the parts of a layer."""
        return self._shard * self.config.hidden_size * self._element

    @property
    def _layer_input(self) -> float:
        """Hidden states from which a layer can be recomputed."""
        divided = self.tensor if self.config.distribute_saved_activations else 1
        return self._hidden / divided

    @property
    def _dropout_mask(self) -> float:
        return self._shard * self.config.hidden_size if self.config.hidden_dropout else 0

    @property
    def _rows(self) -> float:
        """Rows on this rank's experts."""
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
        """A layer with everything that its backward pass reads, averaged over a chunk's layers."""
        dense, moe = self._whole_layer(False), self._whole_layer(True)
        if not chunk.layers:
            return moe if chunk.mtp_layers else 0
        return (chunk.dense_layers * dense + chunk.moe_layers * moe) / chunk.layers

    def _whole_layer(self, moe: bool) -> float:
        return self._norms + self._attention + self._scores + (self._moe if moe else self._dense_mlp)

    def _layer(self, moe: bool) -> float:
        """A layer without what selective recomputation drops."""
        return self._whole_layer(moe) - self._recomputed(moe)

    def _recomputed(self, moe: bool) -> float:
        """What selective recomputation drops of a layer."""
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
            width = self.config.moe_ffn_hidden_size / self.expert_tensor
            dropped += self._rows * width * self._element
        return dropped + (self._shared_experts if self._recomputes("shared_experts") else 0)

    @property
    def _norms(self) -> float:
        """Inputs and outputs of the two norms, and the dropouts before the two residual additions."""
        return 2 * (self._norm_input + self._hidden + self._dropout_mask)

    @property
    def _norm_input(self) -> float:
        """What a norm keeps besides its output."""
        if self.fused or self.config.normalization == "LayerNorm":
            return self._hidden
        # Torch's RMSNorm: its input in fp32, before and after it is divided.
        return 2 * self._shard * self.config.hidden_size * _FP32_BYTES

    @property
    def _query_key_value(self) -> float:
        config = self.config
        heads = config.num_attention_heads
        groups = config.num_query_groups or heads
        if config.multi_latent_attention:
            width = heads * (2 * (config.qk_head_dim + config.qk_pos_emb_head_dim) + config.v_head_dim)
        elif not self.fused and groups < heads:
            # Local attention repeats keys and values for every head that shares them.
            width = 3 * heads * config.kv_channels
        else:
            # The values are a view of all that was projected; rotated queries and keys are new.
            rotated = heads + groups if self.rotates else 0
            width = (heads + 2 * groups + rotated) * config.kv_channels
        return self._tokens * width / self.tensor * self._element

    @property
    def _attention(self) -> float:
        """All but the scores: query, key, value and output, and what they are computed from besides the norm."""
        config = self.config
        heads = config.num_attention_heads
        value_width = config.v_head_dim if config.multi_latent_attention else config.kv_channels
        output = self._tokens * heads * value_width / self.tensor * self._element
        before = 0.0
        if config.multi_latent_attention:
            compressed = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_pos_emb_head_dim
            # Before and after their norms.
            before = 2 * self._shard * compressed * self._element
        elif config.qk_layernorm:
            width = (heads + (config.num_query_groups or heads)) * config.kv_channels
            before = self._tokens * width / self.tensor * self._element
        statistics = self._tokens * heads / self.tensor * _FP32_BYTES if self.fused else 0
        gate = 2 * output if config.attention_output_gate else 0
        return self._query_key_value + output + before + statistics + gate

    @property
    def _scores(self) -> float:
        """Scores of local attention: after the softmax, as they multiply the values, and after dropout."""
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
        """Inside an MLP of a width, all but its input: what goes into and comes out of the activation function."""
        if not self.config.gated_linear_unit:
            return 2 * width * self._element
        # Not fused, both halves are kept for their product once more: activated, and with an offset.
        return (3 if self.fused else 5) * width * self._element

    @property
    def _dense_mlp(self) -> float:
        return self._tokens * self._mlp_per_token(self.config.ffn_hidden_size / self.tensor)

    @property
    def _shared_experts(self) -> float:
        width = self.config.moe_shared_expert_intermediate_size or 0
        return self._tokens * self._mlp_per_token(width / self.tensor)

    @property
    def _moe(self) -> float:
        """Router, the way to the experts, the experts and the shared ones; nothing for a model without experts."""
        if not self.config.num_moe_experts:
            return 0.0
        # Scores for routing and for the load-balancing loss, maps of bool, and indices by which rows are moved.
        router = self._shard * self.config.num_moe_experts * (2 * _FP32_BYTES + 2)
        router += 5 * self._shard * self.experts_per_token * _ID_BYTES
        latent = self._shard * self._hidden_per_row if self.config.moe_latent_size else 0
        return router + latent + self._expert_bytes + self._shared_experts


def micro_batches_in_flight(layout: Layout, stage: int) -> float:
    """How many micro-batches a stage has computed forward and not yet backward, at most.

    For the schedules one-forward-one-backward and, if chunks are interleaved, its variant, of which this returns
    micro-batches of all chunks together (`megatron.core.pipeline_parallel.schedules`).
    """
    stages_after = layout.pipeline - stage - 1
    if layout.virtual_pipeline == 1:
        return min(layout.num_micro_batches, stages_after + 1)
    chunks = layout.virtual_pipeline
    warm_up = 2 * stages_after + (chunks - 1) * layout.micro_batch_group + 1
    return min(layout.num_micro_batches * chunks, warm_up) / chunks
