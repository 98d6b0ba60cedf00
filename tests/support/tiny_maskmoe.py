"""Tiny MaskMoE models for transformers, with routing masks."""

from typing import Any

import numpy as np
import torch
from support.small_moe import make_mask, random_visible_sets
from torch import Tensor

from maskmoe.checkpoint.routing_mask import buffers_of_routing_mask
from maskmoe.conversion.model_tensors import routing_mask_tensors
from maskmoe.huggingface import MaskMoEConfig, MaskMoEForCausalLM
from maskmoe.routing_mask.mask import RoutingMask

VOCAB_SIZE = 60
NUM_EXPERTS = 6
NUM_LAYERS = 3

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "qk_norm": "latent",
}
# Settings by name; together they use every optional feature of a model.
VARIANTS = {
    "plain": {},
    "shared_experts": {"shared_expert_intermediate_size": 20},
    "gated_shared_experts": {"shared_expert_intermediate_size": 20, "shared_expert_gate": True},
    "dense_layers": {"mlp_layer_types": ["dense", "sparse", "dense"]},
    "sigmoid": {"scoring_func": "sigmoid", "use_expert_bias": True, "norm_topk_prob": True},
    "groups": {"n_group": 3, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "qk_norm": {"qk_norm": "head", "head_dim": 12},
    "all_heads_norm": {"qk_norm": "all_heads"},
    "attention_bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "partial_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "latent_attention": _LATENT | {"q_lora_rank": 14},
    "latent_keys_and_values": _LATENT,
}


def make_config(mask: RoutingMask | None = None, **settings: Any) -> MaskMoEConfig:
    """Make a tiny configuration that fits a mask if it is given; `settings` override the defaults."""
    defaults = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    if mask is not None:
        defaults |= {
            "vocab_size": mask.vocab_size,
            "num_experts": mask.num_experts,
            "routing_mask": routing_mask_tensors(mask)[1],
        }
    return MaskMoEConfig(**(defaults | settings))


def random_mask(*sizes: int, tables: int = NUM_LAYERS, seed: int = 0) -> RoutingMask:
    """Draw a mask whose visible sets have these sizes; by default all sizes occur, and half of the sets have size 1."""
    return make_mask(random_visible_sets(seed, tables, VOCAB_SIZE, NUM_EXPERTS, sizes or None), NUM_LAYERS)


def make_model(mask: RoutingMask | None = None, **settings: Any) -> MaskMoEForCausalLM:
    """Make a model with random weights in evaluation mode; `settings` override the configuration's defaults."""
    torch.manual_seed(1)
    mask = random_mask() if mask is None else mask
    model = MaskMoEForCausalLM(make_config(mask, **settings)).eval()
    model.model.routing_mask.load_state_dict(buffers_of_routing_mask(mask))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn_like(buffer) / 4)
    return model


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Draw token ids, int64 of this shape."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape))
