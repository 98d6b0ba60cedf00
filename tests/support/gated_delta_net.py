"""Small transformer layers with a gated delta net, and the same layer of transformers."""

from typing import Any

import torch
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.small_moe import DEVICE, draw_parameters, make_config, process_groups
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from maskmoe.transformer.torch_modules.gated_delta_net import get_gated_delta_net_layer_spec

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
