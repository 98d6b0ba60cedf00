"""GPT models and hybrid models that are their twins."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from support.small_moe import DEVICE, make_config, make_mask, process_groups, random_visible_sets

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.layer_specs import (
    get_maskmoe_decoder_block_spec,
    get_maskmoe_hybrid_stack_spec,
    get_maskmoe_mtp_block_spec,
)
from maskmoe.transformer.models import DenseGPTModel, DenseHybridModel, MaskMoEGPTModel, MaskMoEHybridModel
from maskmoe.transformer.visible_experts import VisibleExperts

VOCAB_SIZE, SEQUENCE, NUM_EXPERTS = 40, 16, 4
LOSSES = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
ARGUMENTS = {"vocab_size": VOCAB_SIZE, "max_sequence_length": SEQUENCE, "position_embedding_type": "rope"}


@dataclass(frozen=True)
class Twins:
    """Settings of a GPT model and the pattern of its hybrid twin.

    Attributes:
        pattern: The pattern of the hybrid model, attention and feed-forward layers in turns.
        settings: Settings of both models' configuration.
        arguments: Arguments of both models.
        mask: The routing mask; by default random visible sets for each feed-forward layer.
    """

    pattern: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    mask: RoutingMask | None = None

    @property
    def layers(self) -> FeedForwardLayers:
        return FeedForwardLayers.of_pattern(self.pattern)

    def gpt(self, **stage: Any) -> torch.nn.Module:
        """Build the GPT model; `stage` overrides its arguments."""
        frequency = [int(has_experts) for has_experts in self.layers.decoder]
        config = self._config(num_layers=len(frequency), moe_layer_freq=frequency)
        visible_experts = self._visible_experts(config)
        arguments = {
            "transformer_layer_spec": get_maskmoe_decoder_block_spec(config, visible_experts),
            "mtp_block_spec": get_maskmoe_mtp_block_spec(config, visible_experts) if config.mtp_num_layers else None,
        }
        return self._build((DenseGPTModel, MaskMoEGPTModel), config, visible_experts, arguments | stage)

    def hybrid(self, **stage: Any) -> torch.nn.Module:
        """Build the hybrid model; `stage` overrides its arguments."""
        num_symbols = len(self.pattern.partition("/")[0].replace("|", ""))
        config = self._config(num_layers=num_symbols, is_hybrid_model=True)
        visible_experts = self._visible_experts(config, self.pattern)
        arguments = {
            "hybrid_stack_spec": get_maskmoe_hybrid_stack_spec(config, visible_experts),
            "hybrid_layer_pattern": self.pattern,
            "pg_collection": process_groups(),
        }
        return self._build((DenseHybridModel, MaskMoEHybridModel), config, visible_experts, arguments | stage)

    def _build(
        self, kinds: tuple[Any, Any], config: TransformerConfig, experts: VisibleExperts | None, arguments: Any
    ) -> torch.nn.Module:
        """Build a model of the first kind, or of the second kind if the model has experts."""
        arguments = ARGUMENTS | self.arguments | arguments | ({} if experts is None else {"visible_experts": experts})
        return kinds[experts is not None](config, **arguments).to(DEVICE)

    def _config(self, **layers: Any) -> TransformerConfig:
        latent = {"config_class": MLATransformerConfig, "multi_latent_attention": True} if "+" in self.pattern else {}
        settings = {"hidden_size": 16, "mtp_num_layers": self.pattern.count("/") or None, **LOSSES, **latent, **layers}
        return make_config(NUM_EXPERTS if self.layers.num_moe_layers else None, **settings | self.settings)

    def _visible_experts(self, config: TransformerConfig, pattern: str | None = None) -> VisibleExperts | None:
        if not config.num_moe_experts:
            return None
        tables = len(self.layers.has_experts)
        mask = self.mask or make_mask(random_visible_sets(6, tables, VOCAB_SIZE, NUM_EXPERTS))
        return VisibleExperts(config, mask, process_groups(), hybrid_layer_pattern=pattern).to(DEVICE)


def copy_parameters(gpt: torch.nn.Module, hybrid: torch.nn.Module) -> dict[str, str]:
    """Copy all parameters of a GPT model to its twin; return the names of the GPT model by the names of the twin."""
    ours, theirs = dict(hybrid.named_parameters()), dict(gpt.named_parameters())
    names = {name: _name_in_gpt(name) for name in ours}
    assert sorted(names.values()) == sorted(theirs)
    with torch.no_grad():
        for name, name_in_gpt in names.items():
            ours[name].copy_(theirs[name_in_gpt])
    return names


def _name_in_gpt(name: str) -> str:
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    name = re.sub(r"(mtp\.layers\.\d+\.mtp_model_layer)\.layers\.\d+\.", r"\1.", name)
    return re.sub(r"decoder\.layers\.(\d+)\.", lambda match: f"decoder.layers.{int(match[1]) // 2}.", name)
