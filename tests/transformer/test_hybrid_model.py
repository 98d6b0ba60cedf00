"""A hybrid model computes the same bits as the GPT model with the same weights."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig
from support.small_moe import (
    DEVICE,
    draw_parameters,
    make_config,
    make_mask,
    process_groups,
    random_visible_sets,
    take_metrics,
)
from torch import Tensor

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.transformer.gpt_model import DenseGPTModel, MaskMoEGPTModel
from maskmoe.transformer.hybrid_layer_specs import get_maskmoe_hybrid_stack_spec
from maskmoe.transformer.hybrid_model import DenseHybridModel, MaskMoEHybridModel
from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec, get_maskmoe_mtp_block_spec
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.visible_experts import VisibleExperts

VOCAB_SIZE, BATCH, SEQUENCE, NUM_EXPERTS = 40, 2, 16, 4
LOSSES = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}


@dataclass(frozen=True)
class Twins:
    """Settings of a GPT model and the pattern of its hybrid twin.

    Attributes:
        pattern: the pattern of the hybrid model.
        settings: settings of both models' configuration.
        arguments: arguments of both models.
    """

    pattern: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> FeedForwardLayers:
        return FeedForwardLayers.of_pattern(self.pattern)

    def config(self, num_layers: int):
        latent = {"config_class": MLATransformerConfig, "multi_latent_attention": True} if "+" in self.pattern else {}
        settings = {"hidden_size": 16, "mtp_num_layers": self.pattern.count("/") or None, **LOSSES, **latent}
        num_experts = NUM_EXPERTS if self.layers.num_moe_layers else None
        return make_config(num_experts, num_layers=num_layers, **settings | self.settings)

    def visible_experts(self, config) -> VisibleExperts:
        tables = len(self.layers.has_experts)
        mask = make_mask(random_visible_sets(6, tables, VOCAB_SIZE, NUM_EXPERTS))
        return VisibleExperts(config, mask, process_groups(), layers=self.layers).to(DEVICE)

    def gpt(self) -> torch.nn.Module:
        config = self.config(num_layers=len(self.layers.decoder))
        config.moe_layer_freq = [int(has_experts) for has_experts in self.layers.decoder]
        arguments = {"vocab_size": VOCAB_SIZE, "max_sequence_length": SEQUENCE, "position_embedding_type": "rope"}
        arguments |= self.arguments
        visible_experts = self.visible_experts(config) if config.num_moe_experts else None
        specs = {
            "transformer_layer_spec": get_maskmoe_decoder_block_spec(config, visible_experts),
            "mtp_block_spec": get_maskmoe_mtp_block_spec(config, visible_experts) if config.mtp_num_layers else None,
        }
        if visible_experts is None:
            return DenseGPTModel(config, **specs, **arguments).to(DEVICE)
        return MaskMoEGPTModel(config, **specs, visible_experts=visible_experts, **arguments).to(DEVICE)

    def hybrid(self) -> torch.nn.Module:
        pattern = self.pattern.partition("/")[0].replace("|", "")
        config = self.config(num_layers=len(pattern))
        config.is_hybrid_model = True
        arguments = {"vocab_size": VOCAB_SIZE, "max_sequence_length": SEQUENCE, "position_embedding_type": "rope"}
        arguments |= {"hybrid_layer_pattern": self.pattern, "pg_collection": process_groups()} | self.arguments
        visible_experts = self.visible_experts(config) if config.num_moe_experts else None
        spec = get_maskmoe_hybrid_stack_spec(config, visible_experts)
        if visible_experts is None:
            return DenseHybridModel(config, spec, **arguments).to(DEVICE)
        return MaskMoEHybridModel(config, spec, visible_experts=visible_experts, **arguments).to(DEVICE)


def name_in_gpt(name: str) -> str:
    """Return the name that a parameter of a hybrid model has in its twin."""
    name = name.replace("decoder.final_norm", "decoder.final_layernorm")
    if match := re.match(r"mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)\.(.*)", name):
        return f"mtp.layers.{match[1]}.mtp_model_layer.{match[3]}"
    if match := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
        symbol = int(match[1])
        return f"decoder.layers.{symbol // 2}.{match[2]}"
    return name


def copy_parameters(gpt: torch.nn.Module, hybrid: torch.nn.Module) -> dict[str, str]:
    """Copy all parameters; return the names in the hybrid model and in the GPT model."""
    ours, theirs = dict(hybrid.named_parameters()), dict(gpt.named_parameters())
    names = {name: name_in_gpt(name) for name in ours}
    assert sorted(names.values()) == sorted(theirs)
    with torch.no_grad():
        for name, name_of_gpt in names.items():
            ours[name].copy_(theirs[name_of_gpt])
    return names


def run(model: torch.nn.Module, padding: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Run two micro-batches forward, then both backward; return the losses and the recorded router losses."""
    take_metrics()
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, VOCAB_SIZE, (2, BATCH, SEQUENCE), generator=generator).to(DEVICE)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(BATCH, -1)
    is_padding = (torch.rand(BATCH, SEQUENCE, generator=generator) < 0.3).to(DEVICE) if padding else None
    # `process_mtp_loss` needs a loss mask to compute the loss of multi-token prediction.
    further = {"loss_mask": torch.ones(BATCH, SEQUENCE, device=DEVICE)} if model.config.mtp_num_layers else {}
    losses = [
        model(ids, positions, None, labels=ids.roll(-1, dims=1), padding_mask=is_padding, **further) for ids in batches
    ]
    for loss in losses:
        loss.mean().backward()
    return torch.stack(losses).detach(), take_metrics()


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
TWINS = {
    "plain": Twins("*E*E"),
    "tied": Twins("*E*E", arguments={"share_embeddings_and_output_weights": True}),
    "norms of queries and keys": Twins("*E*E", {"qk_layernorm": True}),
    "shared experts, expert bias": Twins(
        "*E*E",
        {
            "moe_shared_expert_intermediate_size": 8,
            "moe_router_enable_expert_bias": True,
            "moe_router_score_function": "sigmoid",
        },
    ),
    "dense first": Twins("*-*E"),
    "dense only": Twins("*-*-"),
    "latent attention": Twins(
        "+E+E", {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8}
    ),
    "prediction": Twins("*E*E/*E"),
    "prediction in two depths, tied": Twins("*-*E/*E/*E", arguments={"share_embeddings_and_output_weights": True}),
    "full recompute": Twins("*E*E/*E", FULL),
    "recompute in blocks": Twins("*E*E", FULL | {"recompute_method": "block"}),
    "recompute of moe": Twins("*E*E", {"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
    "recompute of attention": Twins("*E*E", {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    "scaled rope": Twins("*E*E", arguments={"rope_scaling": True, "rope_scaling_factor": 4.0}),
}


@pytest.mark.parametrize("padding", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("name", TWINS)
def test_twins_compute_the_same_bits(name: str, padding: bool) -> None:
    twins = TWINS[name]
    gpt = twins.gpt()
    draw_parameters(gpt)
    hybrid = twins.hybrid()
    names = copy_parameters(gpt, hybrid)
    if padding and twins.layers.num_moe_layers == 0:
        return
    (losses, _), (expected, _) = run(hybrid, padding), run(gpt, padding)
    assert torch.equal(losses, expected)
    theirs = dict(gpt.named_parameters())
    for name_of_hybrid, parameter in hybrid.named_parameters():
        assert torch.equal(parameter.grad, theirs[names[name_of_hybrid]].grad), name_of_hybrid
    numbers = [router.number_in_model for router in hybrid.modules() if isinstance(router, MaskMoERouter)]
    assert numbers == [router.number_in_model for router in gpt.modules() if isinstance(router, MaskMoERouter)]
