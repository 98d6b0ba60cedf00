"""Tiny MaskMoE models for transformers and vLLM, with routing masks, and the answers of transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.small_moe import make_mask, random_visible_sets
from torch import Tensor
from transformers import PreTrainedModel

from maskmoe.checkpoint.read_routing_mask import buffers_of_routing_mask
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


# vLLM's attention on CPUs needs heads of 32 or more features.
SERVED_SIZES = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
}
_SERVED_LATENT = {"head_dim": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
_SERVED_MASKS = {
    "all_visible": (NUM_EXPERTS,),
    "one_visible": (1,),
    "two_visible": (2,),
}
"""Sizes of the visible sets of settings whose ids all see the same number of experts; other settings mix all sizes."""
SERVED_SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {},
    **{name: {} for name in _SERVED_MASKS},
    "shared_table": {},
    "one_expert": {"num_experts_per_tok": 1},
    "one_expert_normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "four_experts": {"num_experts_per_tok": 4, "norm_topk_prob": True},
    "square_root_of_softplus": {"scoring_func": "sqrtsoftplus", "use_expert_bias": True, "norm_topk_prob": True},
    **{name: settings for name, settings in VARIANTS.items() if name != "plain"},
    "qk_norm": {"qk_norm": "head"},
    "latent_attention": VARIANTS["latent_attention"] | _SERVED_LATENT,
    "latent_keys_and_values": VARIANTS["latent_keys_and_values"] | _SERVED_LATENT,
}
"""Settings of served models by name; together they use every optional feature of a model."""


def make_served_model(setting: str) -> PreTrainedModel:
    """Make the model of a name in `SERVED_SETTINGS`, with random weights."""
    mask: RoutingMask = random_mask(*_SERVED_MASKS.get(setting, ()))
    if setting == "shared_table":
        mask = make_mask(mask.visible_sets(0)[None], NUM_LAYERS)
    return make_model(mask, **(SERVED_SIZES | SERVED_SETTINGS[setting]))


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with its code; return the folder."""
    model.save_pretrained(folder)
    return folder


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts of token ids, of 1 to `longest` ids each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@dataclass(frozen=True)
class ServedAnswer:
    """The answer of a model to a prompt.

    Attributes:
        tokens: The ids of the greedy continuation.
        logprobs: Log-probabilities of all ids of prompt and continuation but the first.
    """

    tokens: list[int]
    logprobs: list[float]


@torch.no_grad()
def transformers_answer(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> ServedAnswer:
    """Return transformers' greedy continuation of a prompt, without batching."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)[0]
    logprobs = model(whole[None]).logits[0, :-1].log_softmax(dim=-1)
    chosen = logprobs.gather(1, whole[1:, None]).flatten()
    return ServedAnswer(whole[len(prompt) :].tolist(), chosen.tolist())
