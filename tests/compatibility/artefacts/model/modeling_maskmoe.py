"""MaskMoE for transformers: GLM-4-MoE's decoder, whose routers see the experts of each token's id only.

The blocks are transformers' own; new are the routing mask, the router and the load-balancing loss.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeAttention,
    Glm4MoeMLP,
    Glm4MoeModel,
    Glm4MoeRMSNorm,
    Glm4MoeRotaryEmbedding,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.utils import can_return_tuple
from transformers.utils.generic import maybe_autocast
from transformers.utils.output_capturing import OutputRecorder

from .configuration_maskmoe import MaskMoEConfig

_NO_EXPERT = float("-inf")
_ALL_EXPERTS = 0xFF


class MaskMoERoutingMask(nn.Module):
    """The visible experts of every token id in every layer, kept as integers whatever the model's dtype.

    Until a mask is loaded, every id sees every expert.

    Attributes:
        row_of_id: int16 or int32 [tables, vocab], each id's row of `visible_bits`.
        visible_bits: uint8 [tables, rows, ceil(N / 8)], expert e at bit e % 8 of byte e // 8.
        metadata: uint8 [n], a JSON text: what the mask was made from, and its digest.
    """

    def __init__(self, config: MaskMoEConfig):
        super().__init__()
        sizes = config.routing_mask
        tables, num_bytes = sizes["num_tables"], -(-config.num_experts // 8)
        row_dtype = getattr(torch, sizes["row_dtype"])
        self.register_buffer("row_of_id", torch.zeros(tables, config.vocab_size, dtype=row_dtype))
        self.register_buffer(
            "visible_bits", torch.full((tables, sizes["num_rows"], num_bytes), _ALL_EXPERTS, dtype=torch.uint8)
        )
        self.register_buffer("metadata", torch.zeros(sizes["metadata_bytes"], dtype=torch.uint8))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Look up the visible sets of tokens.

        Args:
            token_ids: int64 [tokens], each smaller than the vocabulary size.

        Returns:
            uint8 [tables, tokens, bytes], as bits.
        """
        rows = self.row_of_id[:, token_ids].long()  # [tables, tokens]
        tables = torch.arange(len(rows), device=rows.device).unsqueeze(-1)
        return self.visible_bits[tables, rows]


def unpack_bits(bits: Tensor, num_experts: int) -> Tensor:
    """Visible sets as bits, uint8 [tokens, bytes], to bool [tokens, experts]."""
    bit_of_byte = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(-1) >> bit_of_byte & 1).flatten(1)[:, :num_experts].bool()


class MaskMoETopKRouter(nn.Module):
    """Chooses the best `min(k, V)` of a token's V visible experts, in float32 also under autocast.

    Selection and weights are those of Megatron-Core's `topk_routing_with_score_function`, over the visible experts.
    """

    def __init__(self, config: MaskMoEConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.num_groups = config.n_group
        self.topk_group = config.topk_group
        self.scoring_func = config.scoring_func
        self.norm_topk_prob = config.norm_topk_prob
        self.scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if config.use_expert_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        else:
            self.e_score_correction_bias = None

    def forward(self, hidden_states: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route tokens.

        Args:
            hidden_states: [tokens, hidden].
            visible: bool [tokens, experts].

        Returns:
            logits: float32 [tokens, experts], -inf for invisible experts.
            weights: float32 [tokens, k], of the selected experts.
            indices: int64 [tokens, k], the selected experts. A token that selects fewer than k names its best one once
                more, with weight 0, so that no invisible expert computes anything.
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states.float(), self.weight.float()).masked_fill(~visible, _NO_EXPERT)
        scores = self._scores(logits)
        candidates = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        candidates = candidates.masked_fill(~visible, _NO_EXPERT)
        if self.num_groups is not None:
            candidates = self._keep_best_groups(candidates)
        best, indices = candidates.topk(self.top_k, dim=-1)  # [tokens, k]
        selected = best != _NO_EXPERT
        weights = self._weights(scores.gather(1, indices), selected)
        return logits, weights, torch.where(selected, indices, indices[:, :1])

    def _scores(self, logits: Tensor) -> Tensor:
        """What experts are compared by, and the weights made from."""
        if self.scoring_func == "sigmoid":
            return logits.sigmoid()
        if self.scoring_func == "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        return logits if self.norm_topk_prob else logits.softmax(dim=-1)

    def _weights(self, scores: Tensor, selected: Tensor) -> Tensor:
        """Weights [tokens, k] of the scores of selected experts, 0 where none was left to select."""
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            weights = scores.masked_fill(~selected, _NO_EXPERT).softmax(dim=-1)
        else:
            weights = scores.masked_fill(~selected, 0.0)
            if self.norm_topk_prob and self.top_k > 1:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.scaling_factor

    def _keep_best_groups(self, candidates: Tensor) -> Tensor:
        """Set candidates [tokens, experts] outside the best groups to -inf (DeepSeek-V3, arXiv 2412.19437).

        A group counts for the sum of its `k / topk_group` best candidates, of fewer if it has fewer, and for nothing if
        it has none.
        """
        of_group = candidates.unflatten(-1, (self.num_groups, -1))  # [tokens, groups, experts of a group]
        best = of_group.topk(self.top_k // self.topk_group, dim=-1).values
        is_missing = best == _NO_EXPERT
        group_scores = best.masked_fill(is_missing, 0.0).sum(dim=-1)
        group_scores = group_scores.masked_fill(is_missing.all(dim=-1), _NO_EXPERT)
        chosen = group_scores.topk(self.topk_group, dim=-1, sorted=False).indices
        is_outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, chosen, False)
        return of_group.masked_fill(is_outside.unsqueeze(-1), _NO_EXPERT).flatten(1)


# transformers looks for this decorator in the source of a model before it lets users choose an implementation.
@use_experts_implementation
class MaskMoEExperts(Qwen3MoeExperts):
    """The gated MLPs of a layer, stacked: `gate_up_proj` [N, 2 * ffn, hidden] and `down_proj` [N, hidden, ffn]."""


class MaskMoESparseMoeBlock(nn.Module):
    """Routed experts, and a shared one if the model has it."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int):
        super().__init__()
        self.table = layer_idx if config.routing_mask["num_tables"] > 1 else 0
        self.gate = MaskMoETopKRouter(config)
        self.experts = MaskMoEExperts(config)
        self.shared_experts = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_experts = Glm4MoeMLP(config, config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, visible_bits: Tensor) -> Tensor:
        """Process tokens [batch, sequence, hidden] with visible sets uint8 [tables, tokens, bytes]."""
        tokens = hidden_states.flatten(0, 1)
        visible = unpack_bits(visible_bits[self.table], self.gate.num_experts)
        _, weights, indices = self.gate(tokens, visible)
        output = self.experts(tokens, indices, weights)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            output = output + shared
        return output.view_as(hidden_states)


class MaskMoEAllHeadsRMSNorm(Glm4MoeRMSNorm):
    """RMSNorm over the features of all heads together, of queries or keys [..., heads, head_dim]."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states.flatten(-2)).view_as(hidden_states)


class MaskMoEAttention(Glm4MoeAttention):
    """Grouped-query attention with rotary positions, and with norms of queries and keys as configured."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qk_norm == "all_heads":
            self.q_norm = MaskMoEAllHeadsRMSNorm(config.num_attention_heads * self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = MaskMoEAllHeadsRMSNorm(config.num_key_value_heads * self.head_dim, eps=config.rms_norm_eps)


class MaskMoEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then a dense MLP or experts, each on normed input and added to the residual stream."""

    def __init__(self, config: MaskMoEConfig, layer_idx: int):
        super().__init__()
        self.is_sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.input_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = MaskMoEAttention(config, layer_idx)
        self.post_attention_layernorm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MaskMoESparseMoeBlock(config, layer_idx) if self.is_sparse else Glm4MoeMLP(config)

    def forward(self, hidden_states: Tensor, visible_bits: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Process tokens.

        Args:
            hidden_states: [batch, sequence, hidden].
            visible_bits: uint8 [tables, tokens, bytes], the visible sets of the same tokens; sparse layers need them.
            kwargs: what attention takes: mask, positions, cache.
        """
        attention_output, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attention_output
        normed = self.post_attention_layernorm(hidden_states)
        return hidden_states + (self.mlp(normed, visible_bits) if self.is_sparse else self.mlp(normed))


class MaskMoEPreTrainedModel(PreTrainedModel):
    """How MaskMoE models are made, saved and loaded."""

    config: MaskMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MaskMoEDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MaskMoETopKRouter, index=0),
        "hidden_states": MaskMoEDecoderLayer,
        "attentions": MaskMoEAttention,
    }

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, which only warns of missing weights; without its mask a model is another one.

        Raises:
            ValueError: the checkpoint has no routing mask.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(name for name in info["missing_keys"] if "routing_mask." in name):
            raise ValueError(
                f"the checkpoint has no routing mask: {', '.join(missing)} missing; export the model again"
            )
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers, if the vocabulary stays as large as the routing mask's.

        Raises:
            ValueError: it does not, and the model has experts.
        """
        if self.config.has_experts and new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(
                f"the routing mask is for {self.config.vocab_size} token ids, not {new_num_tokens}: it says which "
                "experts an id sees, so ids cannot be added or removed without making another one"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MaskMoEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, MaskMoETopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, MaskMoERoutingMask):
            init.zeros_(module.row_of_id)
            init.constant_(module.visible_bits, _ALL_EXPERTS)
            init.zeros_(module.metadata)


class MaskMoEModel(MaskMoEPreTrainedModel, Glm4MoeModel):
    """The decoder without its output layer."""

    # Glm4MoeModel's own list is of layers that its checkpoints have in excess.
    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: MaskMoEConfig):
        super(Glm4MoeModel, self).__init__(config)  # not Glm4MoeModel's constructor, which makes its own layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MaskMoEDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Glm4MoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Glm4MoeRotaryEmbedding(config=config)
        self.routing_mask = MaskMoERoutingMask(config) if config.has_experts else None
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Process tokens.

        Args:
            input_ids: int64 [batch, sequence]; routers need them even where there are embeddings.
            attention_mask: [batch, sequence of cache and tokens], 0 for padding.
            position_ids: int64 [batch, sequence].
            inputs_embeds: [batch, sequence, hidden], in place of the embeddings of `input_ids`.
            kwargs: what every decoder of transformers takes, such as `cache`, `use_cache`, `output_hidden_states`.

        Raises:
            ValueError: there are no `input_ids`.
        """
        visible_bits = None
        if self.routing_mask is not None:
            if input_ids is None:
                raise ValueError("MaskMoE needs input_ids, also with inputs_embeds: experts are chosen by a token's id")
            visible_bits = self.routing_mask(input_ids.flatten())
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            visible_bits=visible_bits,
            **kwargs,
        )


class MaskMoEForCausalLM(MaskMoEPreTrainedModel, GenerationMixin):
    """The decoder and its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MaskMoEConfig):
        super().__init__(config)
        self.model = MaskMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
            input_ids, attention_mask, position_ids, inputs_embeds, kwargs: see `MaskMoEModel.forward`.
            labels: int64 [batch, sequence], the tokens themselves, -100 where no loss is taken.
            output_router_logits: return `router_logits` and `aux_loss`, and add the latter, times
                `config.router_aux_loss_coef`, to `loss`; as configured if None.
            logits_to_keep: how many last positions to compute logits for, or which; 0: all.

        Returns:
            `logits` [batch, sequence, vocab]; `loss` if there are labels; on request `router_logits`, for every sparse
            layer float32 [tokens, experts] with -inf for invisible experts, and `aux_loss`, see `load_balancing_loss`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, kept])
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if output_router_logits and self.config.has_experts:
            aux_loss = load_balancing_loss(
                outputs.router_logits, self._real_tokens(attention_mask, hidden_states), self.config
            )
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        # Handed on under the names they have, since that of the cache differs between versions of transformers.
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **others)

    @staticmethod
    def _real_tokens(attention_mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
        """bool [tokens], those that are no padding; None if that is not known, or all are real."""
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            return None
        return attention_mask[:, -hidden_states.shape[1] :].flatten().bool()


def load_balancing_loss(router_logits: tuple[Tensor, ...], real: Tensor | None, config: MaskMoEConfig) -> Tensor:
    """Load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) over masked probabilities.

    For every sparse layer `N * Σ_i f_i P_i`, with `f_i` the share of all assignments that expert i got and `P_i` its
    mean probability; choices are those by score alone, without expert bias and groups. The layers' losses are added, as
    they are in training with Megatron-Core, and have no coefficient yet.

    Args:
        router_logits: for every sparse layer float32 [tokens, experts], -inf for invisible experts.
        real: bool [tokens], those that are no padding; None: all.
        config: the model's configuration; `aux_loss_tokens` says which tokens count.

    Returns:
        float32 scalar.
    """
    losses = [_load_balancing_loss_of_layer(logits, real, config) for logits in router_logits]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _load_balancing_loss_of_layer(logits: Tensor, real: Tensor | None, config: MaskMoEConfig) -> Tensor:
    visible = logits != _NO_EXPERT
    counted = torch.ones_like(visible[:, 0]) if real is None else real.to(logits.device)
    if config.aux_loss_tokens == "routable":
        counted = counted & (visible.sum(dim=-1) > 1)
    if config.scoring_func == "softmax":
        scores = logits.softmax(dim=-1)
    else:
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else F.softplus(logits).sqrt()
        scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    chosen = scores.masked_fill(~visible, _NO_EXPERT).topk(config.num_experts_per_tok, dim=-1).indices
    assigned = torch.zeros_like(visible).scatter(1, chosen, True) & visible & counted.unsqueeze(-1)
    assignments = assigned.sum(dim=0).float()  # [experts]
    shares = assignments / assignments.sum().clamp(min=1.0)
    mean_scores = (scores * counted.unsqueeze(-1)).sum(dim=0) / counted.sum().clamp(min=1)
    return config.num_experts * (shares * mean_scores).sum()


__all__ = ["MaskMoEForCausalLM", "MaskMoEModel", "MaskMoEPreTrainedModel"]
