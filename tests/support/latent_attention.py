"""Small multi-latent attention, and the same attention of transformers."""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from support.small_moe import DEVICE, draw_parameters, make_config, process_groups
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RMSNorm,
    DeepseekV3RotaryEmbedding,
)

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.torch_modules.latent_attention import LocalMLASelfAttention

EPSILON = 1e-6
SIZES = {"q_lora_rank": 10, "kv_lora_rank": 6, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 5}
"""Sizes of multi-latent attention that all differ."""
YARN = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8, "mscale": 0.7, "mscale_all_dim": 1.3}


def make_latent_attention(**settings: Any) -> LocalMLASelfAttention:
    """Build the attention of a local layer's spec with random parameters; `settings` override the configuration."""
    config = make_config(
        num_experts=None,
        config_class=MLATransformerConfig,
        **{
            "qk_layernorm": True,
            "rope_type": "rope",
            "layernorm_epsilon": EPSILON,
            "hidden_size": 16,
            **SIZES,
            **settings,
        },
    )
    spec = get_maskmoe_decoder_block_spec(config, None).layer_specs[0].submodules.self_attention
    attention = build_module(spec, config=config, layer_number=1, pg_collection=process_groups()).to(DEVICE)
    draw_parameters(attention)
    return attention


class AttentionOfTransformers(torch.nn.Module):
    """`DeepseekV3Attention` with the parameters of a `LocalMLASelfAttention`, by the same names.

    Megatron-Core normalizes the input of queries without compression, which DeepSeek's models do not. The norm is part
    of `q_proj` here.

    Args:
        ours: the attention to compare with.
    """

    def __init__(self, ours: LocalMLASelfAttention) -> None:
        super().__init__()
        config = ours.config
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
        if config.rope_type == "yarn":
            rope |= {
                "rope_type": "yarn",
                "factor": config.rotary_scaling_factor,
                "original_max_position_embeddings": config.original_max_position_embeddings,
                "beta_fast": config.beta_fast,
                "beta_slow": config.beta_slow,
                "mscale": config.mscale,
                "mscale_all_dim": config.mscale_all_dim,
            }
        theirs = DeepseekV3Config(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_head_dim,
            qk_rope_head_dim=config.qk_pos_emb_head_dim,
            v_head_dim=config.v_head_dim,
            rope_parameters=rope,
            attn_implementation="eager",
        )
        self.attention = DeepseekV3Attention(theirs, layer_idx=0)
        self.rotary = DeepseekV3RotaryEmbedding(theirs)
        if config.q_lora_rank is None:
            norm = DeepseekV3RMSNorm(config.hidden_size, EPSILON)
            self.attention.q_proj = torch.nn.Sequential(norm, self.attention.q_proj)
        with torch.no_grad():
            for name, parameter in self.parameters_by_our_names().items():
                parameter.copy_(ours.get_parameter(name))

    def parameters_by_our_names(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters by the names of `LocalMLASelfAttention`."""
        attention = self.attention
        modules = {
            "linear_kv_down_proj": attention.kv_a_proj_with_mqa,
            "kv_layernorm": attention.kv_a_layernorm,
            "linear_kv_up_proj": attention.kv_b_proj,
            "linear_proj": attention.o_proj,
        }
        if attention.q_lora_rank is None:
            modules |= {"q_layernorm": attention.q_proj[0], "linear_q_proj": attention.q_proj[1]}
        else:
            modules["linear_q_down_proj"] = attention.q_a_proj
            modules |= {"q_layernorm": attention.q_a_layernorm, "linear_q_up_proj": attention.q_b_proj}
        return {f"{name}.weight": module.weight for name, module in modules.items()}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute causal attention of hidden states [sequence, batch, hidden]."""
        hidden = hidden.transpose(0, 1)
        length = hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).unsqueeze(0)
        mask = torch.full((1, 1, length, length), float("-inf"), device=hidden.device).triu(1)
        output, _ = self.attention(hidden, self.rotary(hidden, positions), mask)
        return output.transpose(0, 1)
