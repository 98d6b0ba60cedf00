"""Small exported models for serving, and what transformers answers to the same requests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.small_moe import make_mask
from support.tiny_maskmoe import NUM_EXPERTS, NUM_LAYERS, VARIANTS, VOCAB_SIZE, make_model, random_mask
from transformers import PreTrainedModel

from maskmoe.routing_mask.mask import RoutingMask

# vLLM's attention on CPUs needs heads of 32 or more features.
SIZES = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 128,
}
_LATENT = {"head_dim": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
MASKS = {
    "all_visible": (NUM_EXPERTS,),
    "one_visible": (1,),
    "two_visible": (2,),
}
"""Sizes of the visible sets of settings whose ids all see the same number of experts; other settings mix all sizes."""
SETTINGS: dict[str, dict[str, Any]] = {
    "mixed": {},
    **{name: {} for name in MASKS},
    "shared_table": {},
    "one_expert": {"num_experts_per_tok": 1},
    "one_expert_normalised": {"num_experts_per_tok": 1, "norm_topk_prob": True},
    "four_experts": {"num_experts_per_tok": 4, "norm_topk_prob": True},
    "square_root_of_softplus": {"scoring_func": "sqrtsoftplus", "use_expert_bias": True, "norm_topk_prob": True},
    **{name: settings for name, settings in VARIANTS.items() if name != "plain"},
    "qk_norm": {"qk_norm": "head"},
    "latent_attention": VARIANTS["latent_attention"] | _LATENT,
    "latent_keys_and_values": VARIANTS["latent_keys_and_values"] | _LATENT,
}
"""Settings of served models by name; together they use every optional feature of a model."""


def make_served_model(setting: str) -> PreTrainedModel:
    """Make the model of a name in `SETTINGS`, with random weights."""
    mask: RoutingMask = random_mask(*MASKS.get(setting, ()))
    if setting == "shared_table":
        mask = make_mask(mask.visible_sets(0)[None], NUM_LAYERS)
    return make_model(mask, **(SIZES | SETTINGS[setting]))


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    """Save a model with its code; return the folder."""
    model.save_pretrained(folder)
    return folder


def random_prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts of token ids, of 1 to `longest` ids each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB_SIZE, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


@dataclass(frozen=True)
class Answer:
    """The answer of a model to a prompt.

    Attributes:
        tokens: The ids of the greedy continuation.
        logprobs: Log-probabilities of all ids of prompt and continuation but the first.
    """

    tokens: list[int]
    logprobs: list[float]


@torch.no_grad()
def transformers_answer(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> Answer:
    """Return transformers' greedy continuation of a prompt, without batching."""
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    whole = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max_tokens, pad_token_id=0)[0]
    logprobs = model(whole[None]).logits[0, :-1].log_softmax(dim=-1)
    chosen = logprobs.gather(1, whole[1:, None]).flatten()
    return Answer(whole[len(prompt) :].tolist(), chosen.tolist())
