"""Configures MaskMoE models for transformers."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

_CHOICES = {
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
    "aux_loss_tokens": ("all", "routable"),
}

# How tensor parallelism divides the layers; names as in transformers.
_COLUMNS_OF_ATTENTION = ("q_proj", "k_proj", "v_proj")
_TP_PLAN_OF_ATTENTION = {f"layers.*.self_attn.{name}": "colwise" for name in _COLUMNS_OF_ATTENTION} | {
    # A norm over each head gets gradients from the heads of its rank only; their sum is the norm's gradient.
    "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    "layers.*.self_attn.o_proj": "rowwise",
}
# A norm over the features of all heads needs the features of all ranks.
_TP_PLAN_OF_ALL_HEADS_NORM = {
    f"layers.*.self_attn.{name}": "colwise_gather_output" for name in _COLUMNS_OF_ATTENTION
} | {"layers.*.self_attn.o_proj": "rowwise_split_input"}
_TP_PLAN_OF_MLPS = {
    f"layers.*.{mlp}.{name}": style
    for mlp in ("mlp", "mlp.shared_experts")
    for name, style in (("gate_proj", "colwise"), ("up_proj", "colwise"), ("down_proj", "rowwise"))
} | {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}

AUTO_MAP = {
    "AutoConfig": "configuration_maskmoe.MaskMoEConfig",
    "AutoModel": "modeling_maskmoe.MaskMoEModel",
    "AutoModelForCausalLM": "modeling_maskmoe.MaskMoEForCausalLM",
}
"""The `auto_map` of config.json: names the classes that `trust_remote_code` loads from the files beside the weights."""


class MaskMoEConfig(PreTrainedConfig):
    """The settings of a decoder whose mixture-of-experts layers use a routing mask (MaskMoE, arXiv 2407.09816).

    Args:
        vocab_size: number of the tokenizer's ids, without padding.
        hidden_size: number of features of a token between layers.
        intermediate_size: number of intermediate features of the MLP in dense layers.
        num_hidden_layers: number of layers, dense and sparse.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key heads and of value heads; `num_attention_heads` if None.
        head_dim: number of features of a head; `hidden_size / num_attention_heads` if None. With multi-latent
            attention `qk_rope_head_dim`, the features of a head that rotary embedding turns.
        kv_lora_rank: number of features of the latent vector from which keys and values are projected, in multi-latent
            attention (DeepSeek-V2, arXiv 2405.04434); None for grouped-query attention.
        q_lora_rank: number of features of the latent vector from which queries are projected, in multi-latent
            attention; None to project queries from hidden states.
        qk_nope_head_dim: number of features of a query and key head without positions, in multi-latent attention.
        qk_rope_head_dim: number of features of a query and key head with rotary positions, in multi-latent attention.
            Neighbouring features are turned together.
        v_head_dim: number of features of a value head, in multi-latent attention.
        hidden_act: activation function of the gated MLPs.
        max_position_embeddings: number of tokens of the longest sequence that the model was made for.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: is added to the mean square in every norm.
        rope_parameters: parameters of the rotary embedding as in transformers, including "partial_rotary_factor".
        tie_word_embeddings: the output layer uses the embedding's weight.
        attention_bias: the query, key and value projections have biases; the output projection never has one.
        attention_dropout: dropout probability of attention in training.
        qk_norm: RMSNorm of queries and keys: None for no norm, "head" for a norm over each head (Qwen3), "all_heads"
            for a norm over the features of all heads together (OLMoE), "latent" for norms of the inputs of the
            last projections in multi-latent attention: of the latent vectors, and of the hidden states from which
            queries are projected if `q_lora_rank` is None, as in Megatron-Core.
        mlp_layer_types: "sparse" (with experts) or "dense" for each layer. If None, all layers are sparse, or dense if
            `num_experts` is 0.
        num_experts: N, the number of experts in each sparse layer.
        num_experts_per_tok: k, the number of experts of a token. A token with V < k visible experts uses V experts.
        moe_intermediate_size: number of intermediate features of an expert.
        scoring_func: function from the router's logits to scores: "softmax", "sigmoid" or "sqrtsoftplus".
        norm_topk_prob: make the weights of a token's selected experts add up to 1. With "softmax", the weights are a
            softmax over the selected logits, so that a single expert has weight 1. With other scores, this has an
            effect only for k > 1, as in Megatron-Core.
        routed_scaling_factor: factor of the selected experts' weights.
        use_expert_bias: add a bias for each expert to the scores for the selection, but not for the weights
            (DeepSeek-V3); not available with "softmax".
        n_group: number of groups that the experts form; None for no groups.
        topk_group: number of groups from which a token selects its experts; None for no groups.
        shared_expert_intermediate_size: number of intermediate features of the MLP that every token of a sparse layer
            uses; 0 for no such MLP.
        shared_expert_gate: multiply the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
        router_aux_loss_coef: coefficient of the load-balancing loss in the training loss; 0 in a model without sparse
            layers.
        output_router_logits: return router logits and the load-balancing loss, and add this loss to the training loss.
        aux_loss_tokens: "all" to average the load-balancing loss over all tokens, "routable" to average over tokens
            with two or more visible experts.
        num_nextn_predict_layers: number of further tokens that layers of multi-token prediction predict in training.
            transformers does not compute these layers. Their weights lie beside the model.
        mtp_use_repeated_layer: one layer of multi-token prediction predicts all further tokens.
        routing_mask: sizes of the routing mask's tensors: "num_tables" (number of layers including those of multi-token
            prediction, number of sparse layers among them, or 1 for a table that all layers share), "num_rows",
            "row_dtype" ("int16" or "int32", the type of the rows in the digest) and "metadata_bytes"; and the mask's
            digest "sha256", which may be missing. None in a model without sparse layers; in a model with sparse layers,
            None becomes the sizes of the smallest mask under which every id sees all experts.

    Raises:
        ValueError: a field has an invalid value; names the field.
    """

    model_type = "maskmoe"
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]  # older transformers ignore nothing by default

    base_model_tp_plan = _TP_PLAN_OF_ATTENTION | _TP_PLAN_OF_MLPS

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    qk_norm: str | None = None
    mlp_layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 1
    moe_intermediate_size: int = 2816
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    use_expert_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_aux_loss_coef: float = 0.01
    output_router_logits: bool = False
    aux_loss_tokens: str = "all"
    num_nextn_predict_layers: int = 0
    mtp_use_repeated_layer: bool = False
    routing_mask: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.has_latent_attention and self.head_dim is None:
            self.head_dim = self.qk_rope_head_dim
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        if not self.has_experts:
            self.router_aux_loss_coef = 0.0  # else TRL would compute a load-balancing loss
        elif self.routing_mask is None:
            sizes = {"num_tables": 1, "num_rows": self.num_experts + 1, "metadata_bytes": 0}
            self.routing_mask = sizes | {"row_dtype": "int16"}
        if self.has_latent_attention:  # transformers' DeepSeek-V3 does not divide attention either
            plan = dict(_TP_PLAN_OF_MLPS)
            self.base_model_tp_plan = plan  # pyrefly: ignore[read-only]  # transformers changes instances' plans, too
        elif self.qk_norm == "all_heads":
            plan = _TP_PLAN_OF_ALL_HEADS_NORM | _TP_PLAN_OF_MLPS
            self.base_model_tp_plan = plan  # pyrefly: ignore[read-only]
        super().__post_init__(**kwargs)
        self._check()

    @property
    def has_experts(self) -> bool:
        """Whether any layer is sparse."""
        return "sparse" in (self.mlp_layer_types or ())

    @property
    def has_latent_attention(self) -> bool:
        """Whether all layers have multi-latent attention."""
        return self.kv_lora_rank is not None

    @property
    def rope_interleave(self) -> bool:
        """Whether rotary embedding turns neighbouring features; transformers' latent attention reads this attribute."""
        return True

    @property
    def qk_head_dim(self) -> int | None:
        """Number of features of a query and key head in latent attention, else None; transformers reads it."""
        return (self.qk_nope_head_dim or 0) + (self.qk_rope_head_dim or 0) if self.has_latent_attention else None

    @property
    def num_mtp_modules(self) -> int:
        """Number of layers of multi-token prediction that have weights of their own."""
        return min(self.num_nextn_predict_layers, 1) if self.mtp_use_repeated_layer else self.num_nextn_predict_layers

    @property
    def is_sparse(self) -> list[bool]:
        """Whether each layer is sparse; layers of multi-token prediction, which are like the last, are included."""
        kinds = self.mlp_layer_types or []
        return [kind == "sparse" for kind in [*kinds, *kinds[-1:] * self.num_nextn_predict_layers]]

    def routing_table(self, layer_idx: int) -> int:
        """Return the table of the routing mask, from 0, that a sparse layer reads.

        Args:
            layer_idx: number of the layer, from 0.
        """
        num_tables = self.routing_mask["num_tables"] if self.routing_mask else 1
        if num_tables == 1:
            return 0
        return layer_idx if num_tables == len(self.is_sparse) else sum(self.is_sparse[:layer_idx])

    @property
    def use_qk_norm(self) -> bool:
        """Whether queries and keys are normalised; transformers' attention reads this attribute."""
        return self.qk_norm is not None

    def _check(self) -> None:
        """Refuse what no module would notice."""
        choices = _CHOICES | {"qk_norm": (None, "latent") if self.has_latent_attention else (None, "head", "all_heads")}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {values}")
        kinds = self.mlp_layer_types or []
        if {*kinds} - {"sparse", "dense"} or len(kinds) != self.num_hidden_layers:
            raise ValueError(f"mlp_layer_types must name {self.num_hidden_layers} layers, each 'sparse' or 'dense'")
        if not self.has_experts:
            return
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts")
        if (self.n_group is None) != (self.topk_group is None):
            raise ValueError("n_group and topk_group must both be given, or neither")
        if self.topk_group is not None and self.num_experts_per_tok % self.topk_group:
            raise ValueError(f"num_experts_per_tok is not a multiple of topk_group {self.topk_group}")
        num_tables = (self.routing_mask or {}).get("num_tables")
        if num_tables not in (expected := {1, sum(self.is_sparse), len(self.is_sparse)}):
            raise ValueError(f"routing_mask has {num_tables} num_tables; it must be one of {sorted(expected)}")
