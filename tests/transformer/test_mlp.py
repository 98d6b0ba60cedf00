"""The MLPs whose SwiGLU keeps only its input, against Megatron-Core's, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from support.small_moe import DEVICE, draw_parameters, make_config, make_mask, make_visible_experts, process_groups
from support.small_moe import random_visible_sets as visible_sets
from support.tensors import assert_same_tensors, saved_tensors
from torch import Tensor

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.torch_modules.mlp import TorchMLP, TorchSharedExpertMLP


def mlp_of(spec_of: Callable, is_dense: bool, **settings: Any) -> MLP:
    """Build the dense MLP, or the shared expert, of the first of two layers of a block."""
    config = make_config(
        num_layers=2,
        moe_layer_freq=[int(not is_dense), 1],
        moe_shared_expert_intermediate_size=None if is_dense else 12,
        moe_shared_expert_gate=not is_dense,
        **settings,
    )
    builder = spec_of(config).layer_specs[0].submodules.mlp
    if is_dense:
        mlp = builder(config=config, pg_collection=process_groups(), is_mtp_layer=False)
    else:
        mlp = builder.keywords["submodules"].shared_experts(config=config, pg_collection=process_groups(), gate=True)
    mlp.to(DEVICE)
    draw_parameters(mlp)
    return mlp


def our_spec(config: Any) -> Any:
    mask = make_mask(visible_sets(0, 1, 9, 4), num_layers=sum(config.moe_layer_freq))
    return get_maskmoe_decoder_block_spec(
        config, make_visible_experts(config, mask) if config.num_moe_experts else None
    )


def stock_spec(config: Any) -> Any:
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")


def outputs(mlp: MLP, hidden: Tensor) -> dict[str, Tensor]:
    """Return the output, and the gradients of parameters and input."""
    output = mlp(hidden)
    output = output[0] if isinstance(output, tuple) else output
    torch.manual_seed(2)
    inputs = {"hidden": hidden} | dict(mlp.named_parameters())
    gradients = torch.autograd.grad(output, list(inputs.values()), torch.randn_like(output))
    return {"output": output} | dict(zip(inputs, gradients, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True, "params_dtype": torch.bfloat16},
        {"activation_func_clamp_value": 0.5},
        {"gated_linear_unit": False},
        {"bias_activation_fusion": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "shared expert"])
def test_mlp_equals_the_stock_module(is_dense, settings) -> None:
    ours, stock = (mlp_of(spec_of, is_dense, **settings) for spec_of in (our_spec, stock_spec))
    assert type(ours) is (TorchMLP if is_dense else TorchSharedExpertMLP)
    assert ours.state_dict().keys() == stock.state_dict().keys()
    torch.manual_seed(3)
    hidden = torch.randn(5, 2, 8).to(DEVICE, ours.config.params_dtype).requires_grad_()
    assert_same_tensors(outputs(ours, hidden), outputs(stock, hidden))


@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "shared expert"])
def test_mlp_keeps_three_tensors_for_each_channel(is_dense) -> None:
    """The backward pass needs gate and value, and the input of the second linear layer."""
    hidden = torch.randn(50, 2, 8, device=DEVICE, requires_grad=True)

    def kept_per_channel(spec_of: Callable) -> float:
        mlp = mlp_of(spec_of, is_dense)
        storages = [tensor.untyped_storage() for tensor in saved_tensors(lambda: mlp(hidden))]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        of_one = hidden.nbytes // 8 * 12  # 12 channels for 8 features; weights and input are smaller
        return sum(size for size in sizes.values() if size >= of_one) / of_one

    assert kept_per_channel(our_spec) == 3
    assert kept_per_channel(stock_spec) == 5
