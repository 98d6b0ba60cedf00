"""Gated delta net in plain torch: against transformers, with recomputation and in checkpoints."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from support.launchers import RunRanks
from support.small_moe import DEVICE, draw_parameters, initialize_parallelism, make_config, process_groups
from support.tensors import assert_same_tensors
from torch import Tensor
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from maskmoe.transformer.torch_modules.gated_delta_net import check_gated_delta_net, get_gated_delta_net_layer_spec

HIDDEN, EPSILON = 16, 1e-6
SIZES = {
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}


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


# fp32 sums are added in another order. The bound is relative to the largest value of each tensor.
ROUNDING = 3e-5
CHUNK = 64  # tokens that Megatron-Core computes together


def assert_equal_up_to_rounding(found: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, largest = (found[name] - value).abs().max().item(), value.abs().max().item()
        assert error < rounding * largest, (name, error, largest)


@pytest.mark.parametrize("key_heads", [2, 4, 8], ids="{} key heads".format)
@pytest.mark.parametrize("sequence", [2, CHUNK, 2 * CHUNK + 21], ids="{} tokens".format)
def test_equals_the_layer_of_transformers(sequence: int, key_heads: int) -> None:
    layer = make_gated_delta_net(linear_num_key_heads=key_heads)
    hidden, gradient = torch.randn(2, sequence, 2, HIDDEN, device=DEVICE)
    expected = LayerOfTransformers(layer).run(hidden, gradient)
    assert_equal_up_to_rounding(run_layer(layer, hidden, gradient), expected, ROUNDING)


def test_bf16_rounds_no_more_than_transformers() -> None:
    reference = make_gated_delta_net()
    reference.load_state_dict({name: p.bfloat16() for name, p in reference.state_dict().items() if p is not None})
    hidden, gradient = torch.randn(2, 2 * CHUNK, 2, HIDDEN, device=DEVICE).bfloat16()
    expected = run_layer(reference, hidden.float(), gradient.float())
    layer = make_gated_delta_net(bf16=True, params_dtype=torch.bfloat16).bfloat16()
    layer.load_state_dict(reference.state_dict())
    ours = run_layer(layer, hidden, gradient)
    theirs = LayerOfTransformers(reference, torch.bfloat16).run(hidden, gradient)
    for name, value in expected.items():
        assert ours[name].dtype == theirs[name].dtype == torch.bfloat16
        error, usual_error = ((results[name] - value).norm() / value.norm() for results in (ours, theirs))
        # The lengths of the first tokens' queries and keys are close to 0, so rounding changes their gradients much.
        assert error < 1.5 * usual_error < 0.3, (name, error, usual_error)


def save(layer: torch.nn.Module, folder: Path) -> None:
    folder.mkdir()
    dist_checkpointing.save(layer.sharded_state_dict(), str(folder))


def load(folder: Path) -> TransformerLayer:
    layer = make_gated_delta_net()
    layer.load_state_dict(dist_checkpointing.load(layer.sharded_state_dict(), str(folder)))
    return layer


SEQUENCE, BATCH = 160, 2


def exchange_with_transformer_engine(folder: Path) -> None:
    """Load the checkpoint FOLDER/local on Transformer Engine, and save it again to FOLDER/transformer_engine."""
    initialize_parallelism()
    layer = make_gated_delta_net(transformer_impl="transformer_engine")
    state = layer.sharded_state_dict()
    # Only Transformer Engine's norms have a state of FP8, which is empty.
    del state["self_attention.out_norm._extra_state"]
    loaded = dist_checkpointing.load(state, str(folder / "local"))
    layer.load_state_dict(loaded | {"self_attention.out_norm._extra_state": None})
    save(layer, folder / "transformer_engine")


@pytest.mark.te
def test_checkpoints_are_exchanged_with_transformer_engine(run_ranks: RunRanks, tmp_path: Path) -> None:
    layer = make_gated_delta_net()
    save(layer, tmp_path / "local")
    run_ranks(exchange_with_transformer_engine, tmp_path, tmp_path, world_size=1, uses_transformer_engine=True)
    again = load(tmp_path / "transformer_engine")
    assert_same_tensors(dict(again.named_parameters()), dict(layer.named_parameters()))


GIVEN = {
    **{"hybrid_layer_pattern": "*EGE/GE", "swiglu": True, "deterministic_mode": False, "reset_attention_mask": False},
    **{"dataloader_inter_document_masking": False, "transformer_impl": "local"},
}


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"swiglu": False}, "--swiglu"),
        ({"reset_attention_mask": True}, "--reset-attention-mask"),
        ({"dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
    ],
    ids=str,
)
def test_settings_are_refused(settings: dict[str, Any], flags: str) -> None:
    refused = check_gated_delta_net(Namespace(**GIVEN | settings), has_fla=False)
    assert refused is not None
    assert flags in refused
    attention_only = GIVEN | settings | {"hybrid_layer_pattern": "*E*E"}
    for allowed in (GIVEN, attention_only, attention_only | {"hybrid_layer_pattern": None}):
        assert check_gated_delta_net(Namespace(**allowed), has_fla=False) is None
