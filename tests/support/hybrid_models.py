"""Hybrid models: the twins of GPT models, and gated delta nets beside the layer of transformers."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.small_moe import DEVICE, draw_parameters, make_config, make_mask, process_groups, random_visible_sets
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.layer_specs import (
    get_maskmoe_decoder_block_spec,
    get_maskmoe_hybrid_stack_spec,
    get_maskmoe_mtp_block_spec,
)
from maskmoe.transformer.models import DenseGPTModel, DenseHybridModel, MaskMoEGPTModel, MaskMoEHybridModel
from maskmoe.transformer.torch_modules.gated_delta_net import get_gated_delta_net_layer_spec
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


HIDDEN, EPSILON = 16, 1e-6
SIZES = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
RECOMPUTE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["gdn_norm_out"],
    "experimental_attention_variant": "gated_delta_net",
    "linear_attention_freq": 1,
}
"""Settings that recompute the norm after the delta rule."""


def make_gated_delta_net(**settings: Any) -> TransformerLayer:
    """Build a layer with random parameters; `settings` override the configuration.

    Decays are weak, so that the state reaches from one chunk of tokens to the next.
    """
    config = make_config(num_experts=None, **{"hidden_size": HIDDEN, "layernorm_epsilon": EPSILON, **SIZES, **settings})
    layer = build_module(
        get_gated_delta_net_layer_spec(config),
        config=config,
        layer_number=1,
        add_layer_offset=False,
        pg_collection=process_groups(),
    ).to(DEVICE)
    draw_parameters(layer)
    layer.self_attention.A_log.data.sub_(4)
    return layer


def run_layer(layer: TransformerLayer, hidden: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Compute a layer forward and backward.

    Args:
        layer: the layer.
        hidden: hidden states [sequence, batch, hidden].
        gradient: gradient of the output, same shape.

    Returns:
        the output, and the gradients of the input and of the parameters by name.
    """
    hidden = hidden.clone().requires_grad_()
    output, _ = layer(hidden_states=hidden, attention_mask=None)
    output.backward(gradient)
    return {"output": output.detach(), "input": hidden.grad} | {name: p.grad for name, p in layer.named_parameters()}


class LayerOfTransformers:
    """`Qwen3NextGatedDeltaNet` between a norm and a residual connection, with the parameters of our layer.

    Args:
        ours: the layer to compare with.
        dtype: dtype of the parameters.
    """

    def __init__(self, ours: TransformerLayer, dtype: torch.dtype = torch.float32) -> None:
        config = ours.config
        sizes = {name: getattr(config, name) for name in SIZES}
        theirs = Qwen3NextConfig(
            hidden_size=HIDDEN, num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=EPSILON, **sizes
        )
        self._net = Qwen3NextGatedDeltaNet(theirs, layer_idx=0).to(DEVICE, dtype)
        self._norm_weight = ours.input_layernorm.weight.detach().to(dtype, copy=True).requires_grad_()
        # transformers keeps the rows of one key head together, and Megatron-Core the rows of all queries.
        key_heads, value_heads = sizes["linear_num_key_heads"], sizes["linear_num_value_heads"]
        key_rows = sizes["linear_key_head_dim"]
        value_rows = value_heads // key_heads * sizes["linear_value_head_dim"]
        num_rows = key_heads * 2 * (key_rows + value_rows)
        parts = torch.arange(num_rows).view(key_heads, -1).split([key_rows, key_rows, value_rows, value_rows], dim=1)
        strengths = torch.arange(num_rows, num_rows + 2 * value_heads).view(key_heads, 2, -1).unbind(dim=1)
        self._rows = torch.cat([part.flatten() for part in (*parts, *strengths)]).to(DEVICE)

        attention, net = ours.self_attention, self._net
        with torch.no_grad():
            stacked = torch.empty_like(attention.in_proj.weight)
            stacked[self._rows] = attention.in_proj.weight
            net.in_proj_qkvz.weight.copy_(stacked[:num_rows])
            net.in_proj_ba.weight.copy_(stacked[num_rows:])
            for name, parameter in self._parameters().items():
                parameter.copy_(ours.get_parameter(name))

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters that have the same form in our layer, by their names in our layer."""
        net = self._net
        names = {"dt_bias": net.dt_bias, "A_log": net.A_log, "conv1d.weight": net.conv1d.weight}
        names |= {"out_norm.weight": net.norm.weight, "out_proj.weight": net.out_proj.weight}
        return {f"self_attention.{name}": parameter for name, parameter in names.items()}

    def run(self, hidden: Tensor, gradient: Tensor) -> dict[str, Tensor]:
        """Compute what `run_layer` computes, with gradients by the names of our parameters."""
        hidden = hidden.clone().requires_grad_()
        normed = torch.nn.functional.rms_norm(hidden, (HIDDEN,), self._norm_weight, EPSILON)
        output = hidden + self._net(normed.transpose(0, 1)).transpose(0, 1)
        output.backward(gradient)
        net = self._net
        results = {"output": output.detach(), "input": hidden.grad, "input_layernorm.weight": self._norm_weight.grad}
        results |= {name: parameter.grad for name, parameter in self._parameters().items()}
        projections = torch.cat([net.in_proj_qkvz.weight.grad, net.in_proj_ba.weight.grad])
        return results | {"self_attention.in_proj.weight": projections[self._rows]}
