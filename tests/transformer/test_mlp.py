"""SwiGLU that keeps only its input, and the MLPs that use it, against Megatron-Core's, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.mlp import MLP
from support.checkpoint_tensors import assert_same_tensors
from support.saved_tensors import saved_tensors
from support.small_moe import DEVICE, draw_parameters, make_config, make_mask, make_visible_experts, process_groups
from support.small_moe import random_visible_sets as visible_sets
from torch import Tensor
from torch.nn.functional import silu

from maskmoe.transformer.layer_specs import get_maskmoe_decoder_block_spec
from maskmoe.transformer.torch_modules.mlp import TorchMLP, TorchSharedExpertMLP, swiglu

DTYPES = [torch.float32, torch.bfloat16]


def unfused(projected: Tensor, weights: Tensor | None) -> Tensor:
    gate, value = projected.chunk(2, dim=-1)
    activated = silu(gate) * value
    return activated if weights is None else (activated * weights).to(activated.dtype)


def results(function: Callable, projected: Tensor, weights: Tensor | None) -> list[Tensor]:
    """Return the result and the gradients."""
    inputs = [tensor for tensor in (projected, weights) if tensor is not None]
    output = function(projected, weights)
    torch.manual_seed(1)
    return [output, *torch.autograd.grad(output, inputs, torch.randn_like(output))]


def draw(dtype: torch.dtype, weights_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    projected = torch.randn(7, 20).to(DEVICE, dtype).requires_grad_()
    return projected, weights_dtype and torch.rand(7, 1).to(DEVICE, weights_dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights_dtype", [None, *DTYPES], ids=str)
def test_swiglu_equals_the_unfused_operations(dtype, weights_dtype) -> None:
    inputs = draw(dtype, weights_dtype)
    for found, expected in zip(results(swiglu, *inputs), results(unfused, *inputs), strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_swiglu_keeps_its_input_only() -> None:
    projected, weights = draw(torch.float32, torch.float32)
    kept = saved_tensors(lambda: swiglu(projected, weights))
    assert {tensor.data_ptr() for tensor in kept} == {projected.data_ptr(), weights.data_ptr()}


def mlp_of(spec_of: Callable, is_dense: bool, **settings: Any) -> MLP:
    """Build the dense MLP, or the shared expert, of the first layer of a block."""
    config = make_config(
        moe_layer_freq=[int(not is_dense)],
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
    mask = make_mask(visible_sets(0, 1, 9, 4))
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


def test_dense_mlp_with_biases_equals_the_stock_module() -> None:
    ours, stock = (mlp_of(spec_of, is_dense=True, add_bias_linear=True) for spec_of in (our_spec, stock_spec))
    hidden = torch.randn(5, 2, 8, device=DEVICE)
    for found, expected in zip(ours(hidden), stock(hidden), strict=True):
        assert torch.equal(found, expected)


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
