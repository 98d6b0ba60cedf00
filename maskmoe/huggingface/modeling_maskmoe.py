"""Defines the MaskMoE decoder for transformers: GLM-4-MoE's decoder with a router that obeys a routing mask.

Attention, norms, MLPs and rotary embedding are transformers' own. New are the routing mask, the router and the
load-balancing loss. This file is copied beside exported weights and runs without the package `maskmoe`, so it repeats
the routing rule of `maskmoe.transformer.selection` and the load-balancing loss of `maskmoe.transformer.router_losses`.
Change both places together; tests/huggingface/test_routing.py compares them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.glm4_moe import modeling_glm4_moe as glm4_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import OutputRecorder

from .configuration_maskmoe import AUTO_MAP, MaskMoEConfig

_SEAL = "integrity.json"  # of `maskmoe.conversion.seal`
_INVISIBLE = float("-inf")
_ALL_EXPERTS = 0xFF
_WITHOUT_LOSS = -100  # the label of tokens without loss, in transformers' loss, too
_NOT_LOADED = (
    "the routing mask was never loaded: the weights lack the tensors of model.routing_mask; export the model again"
)


class MaskMoERoutingMask(nn.Module):
    """Looks up the visible experts of every token id in every layer.

    The buffers are integers, so they keep their types when the model's dtype changes. A mask that must be loaded has
    metadata; until it is loaded, no id sees any expert, and looking up raises an error. A mask without metadata is
    complete from the start: every id sees every expert.

    Attributes:
        row_of_id: int32 [tables, vocab], the row of `visible_bits` for each id. Older files hold int16.
        visible_bits: uint8 [tables, rows, ceil(N / 8)], expert e at bit `e % 8` of byte `e // 8`.
        metadata: uint8 [n], a JSON text with the mask's digest and what the mask was made from.
        stored_dtype: int16 or int32, the type of `row_of_id` in the digest.
    """

    def __init__(self, config: MaskMoEConfig) -> None:
        super().__init__()
        sizes = config.routing_mask
        assert sizes is not None  # the configuration of a model with experts has one
        tables, num_bytes = sizes["num_tables"], -(-config.num_experts // 8)
        self.stored_dtype: torch.dtype = getattr(torch, sizes["row_dtype"])
        # Data parallelism broadcasts buffers, and neither NCCL nor gloo broadcasts int16.
        self.register_buffer("row_of_id", torch.empty(tables, config.vocab_size, dtype=torch.int32))
        self.register_buffer("visible_bits", torch.empty(tables, sizes["num_rows"], num_bytes, dtype=torch.uint8))
        self.register_buffer("metadata", torch.empty(sizes["metadata_bytes"], dtype=torch.uint8))
        self.must_be_loaded = sizes["metadata_bytes"] > 0
        self._was_loaded = False
        self._sha256 = sizes.get("sha256")
        self._names_of_loaded: set[str] = set()
        self.register_load_state_dict_post_hook(_check_loaded_mask)
        self.reset()

    def reset(self) -> None:
        """Set all buffers to the values that they have until a mask is loaded."""
        init.constant_(self.row_of_id, -1 if self.must_be_loaded else 0)
        init.constant_(self.visible_bits, 0 if self.must_be_loaded else _ALL_EXPERTS)
        init.zeros_(self.metadata)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load buffers, and verify the mask when all buffers are loaded; vLLM calls this instead of `from_pretrained`.

        Args:
            weights: names of buffers and their values; several calls may load one buffer each.

        Returns:
            the names.

        Raises:
            ValueError: a buffer has another shape or dtype, or the mask was damaged or altered.
        """
        buffers, names = dict(self.named_buffers()), set()
        for name, value in weights:
            buffer = buffers[name]
            dtypes = (buffer.dtype, self.stored_dtype) if name == "row_of_id" else (buffer.dtype,)
            if value.shape != buffer.shape or value.dtype not in dtypes:
                raise ValueError(
                    f"the routing mask does not fit config.json: {name} is {value.dtype} {list(value.shape)}, expected "
                    f"{buffer.dtype} {list(buffer.shape)}; export the model again"
                )
            buffer.copy_(value)
            names.add(name)
        self._names_of_loaded |= names
        if self._names_of_loaded == buffers.keys():
            check_digest(self, self._sha256)
        return names

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up the visible sets of tokens in all tables.

        Args:
            token_ids: int64 [tokens], each smaller than the vocabulary size.

        Returns:
            uint8 [tables, tokens, bytes], the visible sets in the form of `visible_bits`.

        Raises:
            ValueError: the mask was never loaded; RuntimeError in a compiled model.
        """
        if self.must_be_loaded and not self.metadata.is_meta:
            self._check_loaded()
        # Unlike indexing, `index_select` refuses negative ids, such as placeholders of inputs without text.
        rows = self.row_of_id.index_select(1, token_ids).long()  # [tables, tokens]
        tables = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
        return self.visible_bits[tables, rows]

    def is_loaded(self) -> Tensor:
        """Return whether all buffers were loaded, a bool on the device."""
        # The first elements suffice. A JSON text has no byte 0, and every visible set of a mask has an expert.
        return (self.metadata[0] != 0) & (self.row_of_id[0, 0] >= 0) & (self.visible_bits[0, 0] != 0).any()

    def _check_loaded(self) -> None:
        if torch.compiler.is_compiling():
            torch._assert_async(self.is_loaded(), _NOT_LOADED)  # becomes a part of the compiled graph
        elif not self._was_loaded:  # read the buffers once, since reading waits for the device
            if not self.is_loaded():
                raise ValueError(_NOT_LOADED)
            self._was_loaded = True


def unpack_bits(bits: Tensor, num_experts: int) -> Tensor:
    """Unpack visible sets, uint8 [tokens, bytes], into bool [tokens, experts]."""
    bit_of_byte = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> bit_of_byte & 1).flatten(1)[:, :num_experts].bool()


def score(logits: Tensor, scoring_func: str) -> Tensor:
    """Apply a scoring function of `MaskMoEConfig` to router logits [tokens, experts]; -inf becomes score 0."""
    if scoring_func == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if scoring_func == "sigmoid" else functional.softplus(logits).sqrt()


class MaskMoETopKRouter(nn.Module):
    """Selects the best `min(k, V)` of a token's V visible experts, in float32 even under autocast.

    Selection and weights follow Megatron-Core's `topk_routing_with_score_function`, restricted to visible experts, as
    `maskmoe.transformer.selection` does in training.
    """

    def __init__(self, config: MaskMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.scoring_func = config.scoring_func
        self.softmax_follows_selection = config.scoring_func == "softmax" and config.norm_topk_prob
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        # In half precision, the constructor's default dtype would round the bias that is loaded into this tensor.
        bias = torch.zeros(config.num_experts).float() if config.use_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: [tokens, hidden].
            visible: bool [tokens, experts].

        Returns:
            logits: float32 [tokens, experts], -inf for invisible experts.
            weights: float32 [tokens, k], the weights of the selected experts.
            indices: int64 [tokens, k], the selected experts. For a token that selects fewer than k experts, the
                remaining entries repeat its best expert with weight 0, so that no invisible expert computes anything.
        """
        # Score the visible experts.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = functional.linear(hidden_states.float(), self.weight.float()).masked_fill(~visible, _INVISIBLE)
        scores = logits if self.softmax_follows_selection else score(logits, self.scoring_func)
        # Select by score plus bias, among visible experts of the best groups.
        candidates = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        candidates = candidates.masked_fill(~visible, _INVISIBLE)
        if self.config.n_group is not None and self.config.topk_group is not None:
            candidates = self._keep_best_groups(candidates, self.config.n_group, self.config.topk_group)
        best, indices = candidates.topk(self.top_k, dim=-1)  # [tokens, k]
        selected = best != _INVISIBLE
        # Weigh by score without bias.
        weights = self._weights(scores.gather(1, indices), selected)
        return logits, weights, torch.where(selected, indices, indices[:, :1])

    def _weights(self, scores: Tensor, selected: Tensor) -> Tensor:
        """Return weights [tokens, k] for scores [tokens, k]; 0 for entries that are not selected."""
        if self.softmax_follows_selection:
            weights = scores.masked_fill(~selected, _INVISIBLE).softmax(dim=-1)
        else:
            weights = scores.masked_fill(~selected, 0.0)
            if self.config.norm_topk_prob and self.top_k > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.config.routed_scaling_factor

    def _keep_best_groups(self, candidates: Tensor, num_groups: int, topk_group: int) -> Tensor:
        """Set candidates [tokens, experts] outside the best groups to -inf (DeepSeek-V3, arXiv 2412.19437).

        The score of a group is the sum of its `k / topk_group` best candidates. If a group has fewer candidates, the
        token's smallest candidate takes the missing places. A group without candidates is never chosen before a group
        with candidates.

        Args:
            candidates: float32 [tokens, experts], -inf for experts that cannot be selected.
            num_groups: number of groups.
            topk_group: number of groups to keep.
        """
        grouped = candidates.unflatten(-1, (num_groups, -1))  # [tokens, groups, experts of a group]
        best = grouped.topk(self.top_k // topk_group, dim=-1).values
        is_missing = best == _INVISIBLE
        smallest = candidates.masked_fill(candidates == _INVISIBLE, -_INVISIBLE).amin(dim=-1)  # [tokens]
        group_scores = torch.where(is_missing, smallest[:, None, None], best).sum(dim=-1)
        group_scores = group_scores.masked_fill(is_missing.all(dim=-1), _INVISIBLE)
        chosen = group_scores.topk(topk_group, dim=-1, sorted=False).indices
        is_outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        return grouped.masked_fill(is_outside.unsqueeze(-1), _INVISIBLE).flatten(1)


# The base class has this decorator, too, but transformers searches for it in the source of each model before it lets
# users choose an implementation.
@use_experts_implementation
class MaskMoEExperts(Qwen3MoeExperts):
    """Computes a layer's experts, which are gated MLPs.

    Their weights are stacked: `gate_up_proj` [N, 2 * ffn, hidden] and `down_proj` [N, hidden, ffn].
    """


class MaskMoESparseMoeBlock(nn.Module):
    """Adds up the outputs of a token's selected experts, and of the shared expert if the model has one."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.table = config.routing_table(layer_idx)
        self.num_experts = config.num_experts  # PEFT may wrap `gate` in a module with another `num_experts`
        self.gate = MaskMoETopKRouter(config)
        self.experts = MaskMoEExperts(config)
        self.shared_experts = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_experts = glm4_moe.Glm4MoeMLP(config, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, visible_bits: Tensor) -> Tensor:
        """Process tokens.

        Args:
            hidden_states: [batch, sequence, hidden].
            visible_bits: uint8 [tables, tokens, bytes], the visible sets of the same tokens.

        Returns:
            [batch, sequence, hidden].
        """
        tokens = hidden_states.flatten(0, 1)
        visible = unpack_bits(visible_bits[self.table], self.num_experts)
        _, weights, indices = self.gate(tokens, visible)
        # Shared experts come first, since the experts of a server may overwrite their input.
        shared = None
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
        output = self.experts(tokens, indices, weights)
        if shared is not None:
            output = output + shared
        return output.view_as(hidden_states)


class MaskMoEAllHeadsRMSNorm(nn.Module):
    """Normalises queries or keys over the features of all heads together.

    The class does not inherit from `Glm4MoeRMSNorm`: with `use_kernels`, transformers would replace `forward` by a
    kernel that normalises each head alone.
    """

    def __init__(self, num_features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise queries or keys [..., heads, head_dim]; some of the heads alone do not fit the weight."""
        norm: Any = glm4_moe.Glm4MoeRMSNorm.forward
        return norm(self, hidden_states.flatten(-2)).view_as(hidden_states)


class MaskMoEAttention(glm4_moe.Glm4MoeAttention):
    """Computes grouped-query attention with rotary positions, and with norms of queries and keys as configured."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int) -> None:
        # transformers annotates its own configuration class, but reads only fields that MaskMoEConfig has, too.
        super().__init__(config, layer_idx)  # pyrefly: ignore[bad-argument-type]
        if config.qk_norm == "all_heads":
            assert config.num_key_value_heads is not None  # set by the configuration
            norm: Any = MaskMoEAllHeadsRMSNorm
            self.q_norm = norm(config.num_attention_heads * self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = norm(config.num_key_value_heads * self.head_dim, eps=config.rms_norm_eps)


class MaskMoENormedLinear(nn.Module):
    """Projects features after an RMSNorm of these features.

    The class does not inherit from `nn.Linear`: servers replace every `nn.Linear` by their own, without the norm.
    """

    def __init__(self, in_features: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.norm = glm4_moe.Glm4MoeRMSNorm(in_features, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise and project features [..., in_features]."""
        return functional.linear(self.norm(input), self.weight)


class MaskMoELatentAttention(DeepseekV3Attention):
    """Computes multi-latent attention, with norms as configured."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # pyrefly: ignore[bad-argument-type]  # see MaskMoEAttention
        assert config.kv_lora_rank is not None  # the configuration of a model with latent attention has one

        def norm(size: int) -> Any:
            # transformers adds 1e-6 to the mean square in these norms whatever is configured.
            return glm4_moe.Glm4MoeRMSNorm(size, eps=config.rms_norm_eps) if config.use_qk_norm else nn.Identity()

        self.kv_a_layernorm = norm(config.kv_lora_rank)
        if config.q_lora_rank is not None:
            self.q_a_layernorm = norm(config.q_lora_rank)
        elif config.use_qk_norm:
            query_features = self.num_heads * self.qk_head_dim
            q_proj: Any = MaskMoENormedLinear(config.hidden_size, query_features, config.rms_norm_eps)
            self.q_proj = q_proj


class MaskMoEDecoderLayer(GradientCheckpointingLayer):
    """Adds attention to the residual stream, then a dense MLP or experts; both get normed input."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.mlp_layer_types is not None  # set by the configuration
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.input_layernorm = glm4_moe.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        attention = MaskMoELatentAttention if config.has_latent_attention else MaskMoEAttention
        self.self_attn = attention(config, layer_idx)
        self.post_attention_layernorm = glm4_moe.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MaskMoESparseMoeBlock(config, layer_idx) if self.is_sparse else glm4_moe.Glm4MoeMLP(config)

    def forward(self, hidden_states: Tensor, visible_bits: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Process tokens.

        Args:
            hidden_states: [batch, sequence, hidden].
            visible_bits: uint8 [tables, tokens, bytes], the visible sets of the same tokens; None only in a model
                without experts.
            kwargs: arguments of attention: mask, positions, cache.
        """
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, visible_bits) if self.is_sparse else self.mlp(normed))


class MaskMoEPreTrainedModel(glm4_moe.Glm4MoePreTrainedModel):
    """Initialises, loads and resizes MaskMoE models."""

    config: MaskMoEConfig  # pyrefly: ignore[bad-override-mutable-attribute]  # as all models of transformers do
    _no_split_modules = ["MaskMoEDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    stages_get_token_ids = False  # vllm_maskmoe.py sets it
    _keys_to_ignore_on_load_unexpected = None  # Glm4Moe ignores layers that only its own checkpoints have
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MaskMoETopKRouter, index=0),
        "hidden_states": MaskMoEDecoderLayer,
        "attentions": [MaskMoEAttention, MaskMoELatentAttention],
    }

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as transformers does, but refuse a checkpoint without its intact routing mask.

        transformers only warns of missing weights, and a model would compute something else without its mask.

        Raises:
            ValueError: the checkpoint has no routing mask, its mask was altered, or a small file of a local folder was
                changed after the export.
        """
        if args and os.path.isdir(args[0]):
            check_seal(args[0])
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if missing := sorted(name for name in info["missing_keys"] if "routing_mask." in name):
            raise ValueError(
                f"the checkpoint has no routing mask: {', '.join(missing)} missing; export the model again"
            )
        for module in model.modules():
            if isinstance(module, MaskMoERoutingMask):
                check_digest(module, (model.config.routing_mask or {}).get("sha256"))
        return (model, info) if output_loading_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does, for all Auto classes; servers load the class of `AutoModel`.

        The seal of a model that is replaced is removed: it does not fit the new files.
        """
        self.config.auto_map = dict(AUTO_MAP)
        with suppress(FileNotFoundError):
            os.remove(os.path.join(save_directory, _SEAL))
        with _original_name(type(self)):
            super().save_pretrained(save_directory, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Choose how experts are computed; by default a quantized model computes them one after another.

        torchao's tensors have no grouped product.
        """
        if requested_experts is None and getattr(self.config, "quantization_config", None) is not None:
            requested_experts = "eager"
        return super().get_correct_experts_implementation(requested_experts)

    @property
    def supports_pp_plan(self) -> bool:
        """Refuse pipeline stages that get no token ids; servers ask here before they divide a model.

        Raises:
            ValueError: the model has experts, and the server has not set `stages_get_token_ids`.
        """
        if self.config.has_experts and not self.stages_get_token_ids:
            raise ValueError(
                "later pipeline stages would get no token ids: use tensor parallelism, or vLLM with "
                """--model-class-overrides '{"MaskMoEForCausalLM": "vllm_maskmoe:MaskMoEForCausalLM"}'"""
            )
        return super().supports_pp_plan

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embedding as transformers does; a model with experts is useless with another number of ids.

        Raises:
            ValueError: the model has experts, and its routing mask is for another number of ids.
        """
        vocab_size = self.config.vocab_size
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.has_experts and self.config.vocab_size != vocab_size:
            raise ValueError(
                f"the routing mask is for {vocab_size} token ids, not {self.config.vocab_size}: it says which experts "
                "an id sees, so ids cannot be added or removed without making another one; load the model again"
            )
        return embedding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (MaskMoEExperts, MaskMoETopKRouter, MaskMoENormedLinear)):
            for weight in module.parameters(recurse=False):
                init.normal_(weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, MaskMoETopKRouter):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)
        if isinstance(module, MaskMoERoutingMask):
            module.reset()


class MaskMoEModel(MaskMoEPreTrainedModel, glm4_moe.Glm4MoeModel):
    """Computes the decoder's hidden states, without the output layer."""

    def __init__(self, config: MaskMoEConfig) -> None:
        # Skip the constructor of Glm4MoeModel, which makes its own layers.
        super(glm4_moe.Glm4MoeModel, self).__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MaskMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = glm4_moe.Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = glm4_moe.Glm4MoeRotaryEmbedding(config=config)  # pyrefly: ignore[bad-argument-type]  # see attention
        self.routing_mask = MaskMoERoutingMask(config) if config.has_experts else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        routing_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Process tokens.

        Args:
            input_ids: int64 [batch, sequence]; routers need the ids even if `inputs_embeds` is given.
            attention_mask: [batch, sequence of cache and tokens], 0 for padding.
            position_ids: int64 [batch, sequence].
            inputs_embeds: [batch, sequence, hidden], replaces the embeddings of `input_ids`.
            routing_ids: int64 [batch, sequence], replaces `input_ids` on later pipeline stages, where vLLM drops them.
            kwargs: arguments of every decoder of transformers, such as `cache`, `use_cache`, `output_hidden_states`.

        Raises:
            ValueError: the model has experts, and `input_ids` is not given or does not name each of `inputs_embeds`.
        """
        visible_bits = None
        if self.routing_mask is not None:
            ids = input_ids if routing_ids is None else routing_ids
            if ids is None:
                raise ValueError("MaskMoE needs input_ids, also with inputs_embeds: experts are chosen by a token's id")
            if inputs_embeds is not None and inputs_embeds.shape[:-1] != ids.shape:
                raise ValueError(f"{list(ids.shape)} token ids do not fit {list(inputs_embeds.shape[:-1])} embeddings")
            visible_bits = self.routing_mask(ids.flatten())
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            visible_bits=visible_bits,
            **kwargs,
        )


class MaskMoEForCausalLM(MaskMoEPreTrainedModel, GenerationMixin):
    """Predicts next tokens with the decoder and an output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: MaskMoEConfig) -> None:
        super().__init__(config)
        self.model = MaskMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _get_name(self) -> str:
        """Return the name of the class without the prefix of FSDP2: Trainer knows causal language models by name."""
        return MaskMoEForCausalLM.__name__

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Predict next tokens.

        Args:
            input_ids: see `MaskMoEModel.forward`.
            attention_mask: see `MaskMoEModel.forward`.
            position_ids: see `MaskMoEModel.forward`.
            inputs_embeds: see `MaskMoEModel.forward`.
            labels: int64 [batch, sequence], the tokens themselves (the loss shifts them), -100 for tokens without loss.
            output_router_logits: return `router_logits` and `aux_loss`, and add `aux_loss` times
                `config.router_aux_loss_coef` to `loss`. None selects `config.output_router_logits`.
            logits_to_keep: number of last positions to compute logits for; 0 for all positions. Or positions, int64
                [positions].
            kwargs: see `MaskMoEModel.forward`; and `num_items_in_batch`, the number of labels in all micro-batches of
                an optimizer step, which transformers' Trainer passes. The micro-batches' losses then add up to the
                step's loss.

        Returns:
            `logits` [batch, sequence, vocab]; `loss`, a scalar, if `labels` is given; on request `router_logits`, for
            each sparse layer float32 [tokens, experts] with -inf for invisible experts, and `aux_loss`, a scalar, see
            `load_balancing_loss`.

        Raises:
            ValueError: the routers are trained, but reentrant gradient checkpointing leaves `aux_loss` no gradient.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids, attention_mask, position_ids, inputs_embeds, output_router_logits=output_router_logits, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_router_logits and self.config.has_experts:
            real = None
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:  # other masks do not mark padding
                real = attention_mask[:, -outputs.last_hidden_state.shape[1] :].flatten().bool()
            aux_loss = load_balancing_loss(outputs.router_logits, real, self.config)
            self._check_has_gradient(aux_loss)
            if labels is not None and loss is not None:
                share = share_of_step(labels, **kwargs).to(loss.device)
                loss = loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)
        # Pass the other outputs on under their names: the cache's name differs between versions of transformers.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)

    def _check_has_gradient(self, aux_loss: Tensor) -> None:
        """Check that routers which are trained get a gradient from the load-balancing loss.

        Reentrant checkpointing computes the layers, and with them the router logits, without gradients.
        """
        if not (self.training and torch.is_grad_enabled() and self.config.router_aux_loss_coef):
            return
        routers = (module for module in self.modules() if isinstance(module, MaskMoETopKRouter))
        if not aux_loss.requires_grad and any(router.weight.requires_grad for router in routers):
            raise ValueError(
                "the load-balancing loss has no gradient under reentrant gradient checkpointing: enable checkpointing "
                "with use_reentrant=False, or set router_aux_loss_coef to 0"
            )


# transformers' Trainer shifts the labels of label smoothing only for classes that this dictionary names.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(MaskMoEConfig.model_type, MaskMoEForCausalLM.__name__)


@contextmanager
def _original_name(model_class: type) -> Iterator[None]:
    """Give a class that torch has derived from a model's class the name and module of this class during the block.

    FSDP2 replaces the class of a model by such a class. transformers copies the file of the class's module beside the
    weights and writes the class's name to `config.json`.
    """
    original = next(base for base in model_class.__mro__ if not base.__module__.startswith("torch."))
    name, module = model_class.__name__, model_class.__module__
    model_class.__name__, model_class.__module__ = original.__name__, original.__module__
    try:
        yield
    finally:
        model_class.__name__, model_class.__module__ = name, module


def share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None, **_: Any
) -> Tensor:
    """Return a micro-batch's share of all labels of an optimizer step, a scalar; 1 if the step's number is unknown.

    Args:
        labels: see `MaskMoEForCausalLM.forward`.
        num_items_in_batch: number of labels in the step, as transformers' loss takes it.
        shift_labels: int64 [batch, sequence], labels that are shifted already and replace `labels`.
    """
    if num_items_in_batch is None:
        return torch.ones((), device=labels.device)
    counted = labels[..., 1:] if shift_labels is None else shift_labels
    return counted.ne(_WITHOUT_LOSS).sum() / torch.as_tensor(num_items_in_batch, device=counted.device)


def load_balancing_loss(router_logits: tuple[Tensor, ...], real: Tensor | None, config: MaskMoEConfig) -> Tensor:
    """Compute the load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    The loss of a sparse layer is `N * Σ_i f_i P_i`, where `f_i` is the share of all assignments that expert i got and
    `P_i` is the mean probability of expert i. Assignments are by score alone, without expert bias and groups, as in
    Megatron-Core.

    Args:
        router_logits: for each sparse layer float32 [tokens, experts], -inf for invisible experts.
        real: bool [tokens], the tokens that are not padding; None: all tokens.
        config: the model's configuration; `aux_loss_tokens` says which tokens count.

    Returns:
        float32 scalar, the sum over layers without coefficient, as in training with Megatron-Core.
    """
    losses = []
    for logits in router_logits:
        # Select the tokens that count.
        visible = logits != _INVISIBLE
        counted = torch.ones_like(visible[:, 0]) if real is None else real.to(logits.device)
        if config.aux_loss_tokens == "routable":
            counted = counted & (visible.sum(dim=-1) > 1)
        # Compute f, the shares of assignments, and P, the mean probabilities.
        scores = score(logits, config.scoring_func)
        if config.scoring_func != "softmax":
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        chosen = scores.masked_fill(~visible, _INVISIBLE).topk(config.num_experts_per_tok, dim=-1).indices
        assigned = torch.zeros_like(visible).scatter(1, chosen, True) & visible & counted.unsqueeze(-1)
        assignments = assigned.sum(dim=0).float()  # [experts]
        shares = assignments / assignments.sum().clamp(min=1.0)
        mean_scores = (scores * counted.unsqueeze(-1)).sum(dim=0) / counted.sum().clamp(min=1)
        losses.append(config.num_experts * (shares * mean_scores).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def check_seal(folder: str) -> None:
    """Compare the small files of an exported model with the digests of the export; a model without them passes.

    Files of weights are only compared by size: `maskmoe` reads them whole, and the mask has a digest of its own.

    Raises:
        ValueError: a file is missing or was changed.
    """
    path = os.path.join(folder, _SEAL)
    if not os.path.isfile(path):
        return
    with open(path, encoding="utf-8") as file:
        seal = json.load(file)
    for name, expected in seal["files"].items():
        try:
            if name.endswith(".safetensors"):
                is_intact = os.path.getsize(os.path.join(folder, name)) == seal.get("sizes", {}).get(name)
            else:
                with open(os.path.join(folder, name), "rb") as content:
                    is_intact = hashlib.file_digest(content, "sha256").hexdigest() == expected
        except OSError:
            is_intact = False
        if not is_intact:
            raise ValueError(
                f"{name} in {folder} is not the file that was exported; export the model again, or remove {_SEAL} if "
                "the change is intended"
            )


def _check_loaded_mask(mask: MaskMoERoutingMask, incompatible_keys: object) -> None:
    """Refuse another model's mask, which would silently change what the model computes; a hook of `load_state_dict`."""
    if mask.must_be_loaded and not mask.metadata.is_meta and mask.is_loaded():
        check_digest(mask, mask._sha256)


def check_digest(mask: MaskMoERoutingMask, expected: str | None = None) -> None:
    """Compare a routing mask with the digest in its metadata, as `maskmoe.routing_mask.sealed_tensors` computes it.

    A mask without metadata passes: every id sees every expert. A mask on the meta device has no content to compare.

    Args:
        mask: the mask.
        expected: the digest of the mask that the model was exported with, if it is known.

    Raises:
        ValueError: the mask was damaged or altered, or is another mask.
    """
    if mask.metadata.is_meta:
        return
    if not mask.metadata.numel():
        is_intact = expected is None and bool((mask.visible_bits == _ALL_EXPERTS).all())
    else:
        try:
            envelope = json.loads(json.loads(bytes(mask.metadata.tolist()))["maskmoe"])
            record = json.dumps(envelope["record"], sort_keys=True, separators=(",", ":"), allow_nan=False)
            digest = hashlib.sha256(record.encode())
            rows = mask.row_of_id.to(mask.stored_dtype)
            for name, tensor in (("row_of_id", rows), ("visible_bits", mask.visible_bits)):
                array = np.ascontiguousarray(tensor.cpu().numpy())
                digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
                digest.update(array)
            is_intact = digest.hexdigest() == envelope["sha256"] and expected in (None, digest.hexdigest())
            is_intact = is_intact and bool((rows == mask.row_of_id).all())  # no row was too large for its stored type
        except (KeyError, TypeError, ValueError, RecursionError):
            is_intact = False
    if not is_intact:
        raise ValueError(
            "the routing mask was damaged or altered: it does not match its digest; export the model again"
        )


__all__ = ["MaskMoEForCausalLM", "MaskMoEModel", "MaskMoEPreTrainedModel"]
