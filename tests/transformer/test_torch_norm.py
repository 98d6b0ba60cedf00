"""Norms of torch in tensor- and sequence-parallel models."""

import pytest
import torch
from support.saved_tensors import saved_tensors
from support.small_moe import DEVICE, make_config
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.transformer.torch_modules.torch_norm import TorchNorm

NORMS = [torch.nn.LayerNorm, torch.nn.RMSNorm]
# Sums over features and tokens are added in another order.
FP32_TOLERANCE = {"rtol": 3e-6, "atol": 3e-6}


@pytest.mark.parametrize("norm_class", NORMS)
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_is_the_norm_of_torch(norm_class: type, sequence_parallel: bool) -> None:
    config = make_config(
        normalization=norm_class.__name__,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=1 + sequence_parallel,
    )
    norm = TorchNorm(config=config, hidden_size=8, eps=1e-3, persist_layer_norm=True)
    assert isinstance(norm, norm_class)
    assert norm.eps == 1e-3
    assert norm.state_dict().keys() == norm_class(8).state_dict().keys()
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())


def results(norm: torch.nn.Module, hidden: Tensor) -> list[Tensor]:
    """Return the output, and the gradients of the input and the parameters."""
    output = norm(hidden)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator).bfloat16().to(DEVICE, output.dtype)
    return [output, *torch.autograd.grad(output, [hidden, *norm.parameters()], gradient)]


def draw_pair(norm_class: type, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return our norm and torch's norm with the same weights."""
    ours = TorchNorm(make_config(normalization=norm_class.__name__), 64, eps=1e-3).to(DEVICE, dtype)
    theirs = norm_class(64, eps=1e-3).to(DEVICE, dtype)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        one.data.copy_(torch.randn(64))
        other.data.copy_(one)
    return ours, theirs


@pytest.mark.parametrize("norm_class", NORMS)
@pytest.mark.parametrize("is_view", [False, True], ids=["contiguous", "view of a larger tensor"])
def test_equals_the_norm_of_torch(norm_class: type, is_view: bool) -> None:
    ours, theirs = draw_pair(norm_class, torch.float32)
    hidden = 5 * torch.randn(7, 2, 192 if is_view else 64, device=DEVICE)
    hidden = hidden.unflatten(-1, (-1, 64)).transpose(1, 2)[..., 0, :].detach().requires_grad_()
    for one, other in zip(results(ours, hidden), results(theirs, hidden), strict=True):
        torch.testing.assert_close(one, other, **FP32_TOLERANCE)


def test_rms_norm_of_bf16_is_computed_in_fp32() -> None:
    """Output and gradients are those of fp32, rounded once."""
    ours, _ = draw_pair(torch.nn.RMSNorm, torch.bfloat16)
    _, exact = draw_pair(torch.nn.RMSNorm, torch.float32)
    exact.weight.data.copy_(ours.weight)
    hidden = torch.randn(7, 2, 64).to(DEVICE, torch.bfloat16).requires_grad_()
    found, expected = results(ours, hidden), results(exact, hidden.detach().float().requires_grad_())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.float(), other, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_keeps_its_input_only(dtype: torch.dtype) -> None:
    def kept(norm: torch.nn.Module) -> set[int]:
        saved = saved_tensors(lambda: norm(hidden))
        return {tensor.data_ptr() for tensor in saved if tensor.numel() == hidden.numel()}

    ours, theirs = draw_pair(torch.nn.RMSNorm, dtype)
    hidden = torch.randn(7, 2, 64).to(DEVICE, dtype).requires_grad_()
    assert kept(ours) == {hidden.data_ptr()}
    if cpu.is_installed():
        assert len(kept(theirs)) == 2


@pytest.mark.parametrize("norm_class", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_centred_weights_are_added_to_one(norm_class: type, dtype: torch.dtype) -> None:
    config = make_config(normalization=norm_class.__name__, layernorm_zero_centered_gamma=True)
    ours, theirs = TorchNorm(config, 64, eps=1e-3).to(DEVICE, dtype), norm_class(64, eps=1e-3).to(DEVICE)
    assert not any(parameter.any() for parameter in ours.parameters())
    ours.weight.data.normal_(std=0.1)
    theirs.weight.data.copy_(1 + ours.weight.float())
    hidden = (5 * torch.randn(7, 2, 64, device=DEVICE)).to(dtype).requires_grad_()
    found, expected = results(ours, hidden), results(theirs, hidden.detach().float().requires_grad_())
    # In bf16, normalized features are rounded before they are multiplied, and gradients add 14 rounded products. Each
    # error is at most 2**-9 of a product of up to about 4, so the sum of the errors is at most 0.11.
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else {"rtol": 2**-6, "atol": 0.11}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, **tolerance)


@pytest.mark.parametrize("norm_class", NORMS)
@pytest.mark.parametrize("is_zero_centred", [False, True], ids=["", "zero-centred"])
def test_residuals_in_fp32_are_cast_to_the_parameters(norm_class: type, is_zero_centred: bool) -> None:
    """The next linear layer takes bf16, and the gradient of the residual stays in fp32."""
    settings = {"normalization": norm_class.__name__, "layernorm_zero_centered_gamma": is_zero_centred}
    norm, plain = (
        TorchNorm(make_config(**settings, fp32_residual_connection=is_fp32), 64).to(DEVICE, torch.bfloat16)
        for is_fp32 in (True, False)
    )
    hidden = (5 * torch.randn(7, 2, 64, device=DEVICE)).requires_grad_()
    found, expected = results(norm, hidden), results(plain, hidden.detach().bfloat16().requires_grad_())
    assert found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other.to(one.dtype))


def test_refuses_a_norm_that_torch_lacks() -> None:
    config = make_config()
    config.normalization = "L2Norm"
    with pytest.raises(ValueError, match="L2Norm"):
        TorchNorm(config, 8)
