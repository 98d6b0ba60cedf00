"""Configuration of a MaskMoE model for transformers."""

from typing import Any

from transformers import PreTrainedConfig

_CHOICES = {
    "qk_norm": (None, "head", "all_heads"),
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
    "aux_loss_tokens": ("all", "routable"),
}
_ROW_DTYPES = ("int16", "int32")


class MaskMoEConfig(PreTrainedConfig):
    """A decoder whose mixture-of-experts layers route under a routing mask (MaskMoE, arXiv 2407.09816).

    Args:
        vocab_size: ids of the tokenizer, without padding.
        hidden_size: features of a token between layers.
        intermediate_size: of the MLP in dense layers.
        num_hidden_layers: dense and sparse ones.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; as many as query heads if None.
        head_dim: features of a head; `hidden_size / num_attention_heads` if None.
        hidden_act: activation of the gated MLPs.
        max_position_embeddings: the longest sequence the model was made for.
        initializer_range: standard deviation of new weights.
        rms_norm_eps: added to the mean square in every norm.
        rope_parameters: rotary embedding as in transformers, "partial_rotary_factor" included.
        tie_word_embeddings: the output layer uses the embedding's weight.
        attention_bias: biases on the query, key and value projections; the output projection has none.
        attention_dropout: probability, in training.
        qk_norm: RMSNorm of queries and keys: none, over each "head" (Qwen3), or over the features of "all_heads"
            together (OLMoE).
        mlp_layer_types: "sparse" (experts) or "dense" for every layer; all sparse if None, all dense without experts.
        num_experts: N, in every sparse layer.
        num_experts_per_tok: k. A token with V < k visible experts gets V of them.
        moe_intermediate_size: of an expert.
        scoring_func: what makes scores of the router's logits: "softmax", "sigmoid" or "sqrtsoftplus".
        norm_topk_prob: the weights of a token's selected experts add up to 1. With "softmax" this is a softmax over the
            selected logits, whereby one expert alone has weight 1; with the other scores, as in Megatron-Core, it has
            effect for k > 1 only.
        routed_scaling_factor: factor of the selected experts' weights.
        use_expert_bias: a bias per expert takes part in the selection but not in the weights (DeepSeek-V3); not with
            "softmax".
        n_group, topk_group: the experts form `n_group` groups, and a token selects from the best `topk_group` of them;
            both None: no groups.
        shared_expert_intermediate_size: of the MLP that every token of a sparse layer uses; 0: none.
        shared_expert_gate: scale the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
        router_aux_loss_coef: coefficient of the load-balancing loss in the training loss.
        output_router_logits: return router logits and the load-balancing loss, and add the latter to the training loss.
        aux_loss_tokens: average the load-balancing loss over "all" tokens or over those that see two experts or more.
        routing_mask: sizes of the routing mask's tensors: "num_tables" (one per layer, or one for all), "num_rows",
            "row_dtype" (int16 or int32) and "metadata_bytes". None without sparse layers; with them, it stands for the
            smallest mask under which every id sees all experts.

    Raises:
        ValueError: naming the field whose value does not fit.
    """

    model_type = "maskmoe"

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
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
    routing_mask: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse" if self.num_experts else "dense"] * self.num_hidden_layers
        if self.has_experts and self.routing_mask is None:
            self.routing_mask = {
                "num_tables": 1,
                "num_rows": self.num_experts + 1,
                "row_dtype": "int16",
                "metadata_bytes": 0,
            }
        super().__post_init__(**kwargs)
        self._check()

    @property
    def has_experts(self) -> bool:
        """Whether any layer is sparse."""
        return "sparse" in self.mlp_layer_types

    @property
    def use_qk_norm(self) -> bool:
        """Whether queries and keys are normalised; what transformers' attention asks."""
        return self.qk_norm is not None

    def _check(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {choices}")
        unknown = set(self.mlp_layer_types) - {"sparse", "dense"}
        if unknown or len(self.mlp_layer_types) != self.num_hidden_layers:
            raise ValueError(f"mlp_layer_types must name {self.num_hidden_layers} layers, each 'sparse' or 'dense'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.has_experts:
            self._check_experts()

    def _check_experts(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(f"num_experts_per_tok is {self.num_experts_per_tok} of {self.num_experts} experts")
        if self.use_expert_bias and self.scoring_func == "softmax":
            raise ValueError("use_expert_bias needs scoring_func 'sigmoid' or 'sqrtsoftplus'")
        if (self.n_group is None) != (self.topk_group is None):
            raise ValueError("n_group and topk_group must both be given, or neither")
        if self.n_group is not None:
            self._check_groups()
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise ValueError("shared_expert_gate needs a shared_expert_intermediate_size")
        mask = self.routing_mask
        if mask.get("num_tables") not in (1, self.num_hidden_layers) or mask.get("row_dtype") not in _ROW_DTYPES:
            raise ValueError(
                f"routing_mask must have 1 or {self.num_hidden_layers} num_tables and a row_dtype of {_ROW_DTYPES}; "
                f"it is {mask}"
            )

    def _check_groups(self) -> None:
        if self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(f"topk_group {self.topk_group} of n_group {self.n_group} for {self.num_experts} experts")
        if self.num_experts_per_tok % self.topk_group:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is no multiple of topk_group {self.topk_group}"
            )
        if self.num_experts // self.n_group * self.topk_group < self.num_experts_per_tok:
            raise ValueError(
                f"{self.topk_group} of {self.n_group} groups hold fewer experts than num_experts_per_tok "
                f"{self.num_experts_per_tok}"
            )
