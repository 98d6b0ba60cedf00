"""Multi-latent attention for models without Transformer Engine."""

from dataclasses import replace
from typing import Any

from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.typed_torch import apply_module
from torch import Tensor

from maskmoe.megatron_compat.process_patches import building_replicated_linears_of
from maskmoe.transformer.torch_modules.linear import ReplicatedLinear


class LocalMLASelfAttention(MLASelfAttention):
    """`MLASelfAttention` of local modules that computes what Transformer Engine's modules compute.

    Transformer Engine normalizes inside the projections, and this class before them. `keys_of_checkpoint` maps the
    norms' names, so that checkpoints can be exchanged. Every tensor-parallel rank holds the down projections whole.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, *args: Any, **kwargs: Any
    ) -> None:
        down: Any = ReplicatedLinear
        submodules = replace(submodules, linear_q_down_proj=down, linear_kv_down_proj=down)
        with building_replicated_linears_of(ReplicatedLinear, multi_latent_attention):
            super().__init__(config, submodules, *args, **kwargs)
        if config.q_lora_rank is None:
            self.q_layernorm = submodules.q_layernorm(
                hidden_size=config.hidden_size, config=config, eps=config.layernorm_epsilon
            )

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict:
        """Return the norms and projections of the spec; the stock method demands projections that normalize."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compress queries, and keys with values; queries without compression are normalized hidden states.

        Returns the input of the queries' up-projection or, with compression, of its norm; and the compressed keys and
        values beside the keys' positional part [sequence, batch, kv_lora_rank + qk_pos_emb_head_dim].
        """
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if self.config.q_lora_rank is None:
            q_compressed = apply_module(self.q_layernorm)(q_compressed)
        return q_compressed, kv_combined


def keys_of_checkpoint(config: MLATransformerConfig, has_experts: bool) -> dict[str, str]:
    """Return a layer's `sharded_state_dict_keys_map`: the norms' names in a checkpoint of Transformer Engine."""
    query_projection = "linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"
    before_mlp = {} if has_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return {
        "self_attention.q_layernorm.": f"self_attention.{query_projection}.layer_norm_",
        "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
        **before_mlp,
    }
