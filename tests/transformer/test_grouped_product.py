"""Kernels of grouped products, in Triton's interpreter, against one product in plain torch for each expert."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.kernels import kernels_on_cpu
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.transformer.kernels import grouped_product
from maskmoe.transformer.kernels.grouped_linear import grouped_linear
from maskmoe.transformer.kernels.grouped_product import Tile

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Tolerances relate to the largest value. The interpreter cuts off the bits that bf16 lacks, which a GPU rounds."""


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    """Run the kernels on the CPU; memory that is not initialised holds NaN."""
    with kernels_on_cpu():
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def _small_tiles(monkeypatch) -> None:
    """Divide small products into several tiles."""
    monkeypatch.setattr(grouped_product, "_tile_of_rows", lambda rows, columns, num_experts: Tile(16, 32, 16, 4, 2))
    monkeypatch.setattr(grouped_product, "_tile_of_weight", lambda dtype: Tile(32, 16, 16, 4, 2))


class Inputs(NamedTuple):
    """The inputs of grouped products: rows [rows, in], weights [out, in], and the output's gradient [rows, out]."""

    rows: Tensor
    weights: list[Tensor]
    gradient: Tensor
    ends: Tensor


def draw(sizes: list[int], in_size: int, out_size: int, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Draw inputs; the weights lie in one buffer in reverse order, as under Megatron's data parallelism, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(sizes), in_size, generator=generator).to(DEVICE, dtype)
    gradient = torch.randn(sum(sizes), out_size, generator=generator).to(DEVICE, dtype)
    buffer = torch.randn(len(sizes), out_size * in_size + 3, generator=generator).to(DEVICE, dtype)
    weights = [part[3:].view(out_size, in_size) for part in reversed(buffer)]
    return Inputs(rows, weights, gradient, torch.tensor(sizes).cumsum(0, dtype=torch.int32).to(DEVICE))


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare with an fp32 result."""
    assert found.shape == expected.shape
    largest = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=TOLERANCE[dtype] * largest)


def compare(sizes: list[int], in_size: int, out_size: int, dtype: torch.dtype) -> None:
    """Compare the output and all gradients with products in fp32."""
    rows, weights, gradient, ends = draw(sizes, in_size, out_size, dtype)
    rows.requires_grad_()
    weights = [weight.requires_grad_() for weight in weights]
    output = grouped_linear(rows, ends, weights)
    rows_gradient, *weight_gradients = torch.autograd.grad(output, [rows, *weights], gradient)
    assert output.dtype == rows_gradient.dtype == dtype
    parts = zip(rows.float().split(sizes), gradient.float().split(sizes), weights, weight_gradients, strict=True)
    expected, expected_rows = [], []
    for own_rows, own_gradient, weight, weight_gradient in parts:
        expected.append(own_rows @ weight.float().t())
        expected_rows.append(own_gradient @ weight.float())
        assert weight_gradient.dtype == dtype
        assert_near(weight_gradient, own_gradient.t() @ own_rows, dtype)
    assert_near(output, torch.cat(expected), dtype)
    assert_near(rows_gradient, torch.cat(expected_rows), dtype)


@given(
    sizes=st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=5),
    in_size=st.integers(1, 40),
    out_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@example([0, 0, 5, 0, 17, 0], 32, 64, torch.bfloat16)
@example([0, 0, 0], 5, 7, torch.bfloat16)
@example([16, 32, 16], 16, 32, torch.float32)
@settings(max_examples=20)
@pytest.mark.usefixtures("_small_tiles")
def test_products_equal_those_of_single_experts(sizes, in_size, out_size, dtype) -> None:
    compare(sizes, in_size, out_size, dtype)


@pytest.mark.parametrize("sizes", [[0, 3, 70, 0, 9, 0], [1, 0, 330]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("has_large_shared_memory", [False, True])
def test_tiles_for_gpus(sizes, has_large_shared_memory, monkeypatch) -> None:
    monkeypatch.setattr(grouped_product, "_has_large_shared_memory", lambda device: has_large_shared_memory)
    compare(sizes, 136, 264, torch.bfloat16)


class MainGrads(NamedTuple):
    """Weights as Megatron's data parallelism prepares them, and their `main_grad` before the backward pass."""

    weights: list[Tensor]
    before: list[Tensor]


def with_main_grads(weights: list[Tensor], dtypes: list[torch.dtype]) -> MainGrads:
    """Give each weight a `main_grad` of a dtype that holds values."""
    for weight, dtype in zip(weights, dtypes, strict=True):
        weight.requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad = torch.randn_like(weight, dtype=dtype), False
    return MainGrads(weights, [weight.main_grad.clone() for weight in weights])


@pytest.mark.usefixtures("_small_tiles")
def test_gradients_are_added_to_main_grad_in_fp32() -> None:
    """Two micro-batches of bf16 leave sums that are as exact as fp32, in the memory of `main_grad`."""
    sizes, shape = [0, 21, 5, 0], (24, 40)  # in, out
    weights, before = with_main_grads(draw(sizes, *shape, torch.bfloat16).weights, [torch.float32] * 4)
    memory = [weight.main_grad.data_ptr() for weight in weights]
    expected = list(before)
    for seed in (1, 2):
        rows, _, gradient, ends = draw(sizes, *shape, torch.bfloat16, seed)
        gradients = torch.autograd.grad(grouped_linear(rows, ends, weights), weights, gradient)
        assert all(g.shape == (40, 24) and g.dtype == torch.bfloat16 and not g.any() for g in gradients)
        products = (g.float().t() @ r.float() for g, r in zip(gradient.split(sizes), rows.split(sizes), strict=True))
        expected = [total + product for total, product in zip(expected, products, strict=True)]
    for weight, total in zip(weights, expected, strict=True):
        assert weight.grad_added_to_main_grad
        assert_near(weight.main_grad, total, torch.float32)
    assert all(torch.equal(weights[empty].main_grad, before[empty]) for empty in (0, 3))
    assert memory == [weight.main_grad.data_ptr() for weight in weights]


@pytest.mark.usefixtures("_small_tiles")
def test_main_grad_of_bf16_is_rounded_once() -> None:
    """`--accumulate-allreduce-grads-in-fp32` may be off, and Megatron can raise the precision of some parameters."""
    sizes, dtypes = [9, 0, 12], [torch.bfloat16, torch.bfloat16, torch.float32]
    rows, weights, gradient, ends = draw(sizes, 24, 40, torch.bfloat16)
    weights, before = with_main_grads(weights, dtypes)
    torch.autograd.grad(grouped_linear(rows, ends, weights), weights, gradient)
    parts = zip(weights, before, gradient.float().split(sizes), rows.float().split(sizes), strict=True)
    for weight, old, own_gradient, own_rows in parts:
        exact = old.float() + own_gradient.t() @ own_rows
        relative = 2**-7 if weight.main_grad.dtype == torch.bfloat16 else 0
        torch.testing.assert_close(weight.main_grad.float(), exact, rtol=relative, atol=1e-5)
    assert [weight.main_grad.dtype for weight in weights] == dtypes
    assert torch.equal(weights[1].main_grad, before[1])


@pytest.mark.parametrize("has_main_grads", [False, True])
@pytest.mark.usefixtures("_small_tiles")
def test_frozen_weights_get_no_gradient(has_main_grads) -> None:
    rows, weights, gradient, ends = draw([4, 7, 2], 24, 40, torch.float32)
    if has_main_grads:
        weights, before = with_main_grads(weights, [torch.float32] * 3)
    weights = [weight.requires_grad_(number != 1) for number, weight in enumerate(weights)]
    grouped_linear(rows, ends, weights).backward(gradient)
    assert weights[1].grad is None
    assert all(weight.grad is not None for weight in (weights[0], weights[2]))
    if has_main_grads:
        assert torch.equal(weights[1].main_grad, before[1])
        assert not torch.equal(weights[2].main_grad, before[2])
    frozen = [weight.detach() for weight in weights]
    assert not grouped_linear(rows, ends, frozen).requires_grad
    grouped_linear(rows.requires_grad_(), ends, frozen).backward(gradient)
    assert rows.grad is not None


def test_no_product_allocates_memory_for_all_weights() -> None:
    """Count the elements of new tensors: the output, and one weight's gradient that stands for all experts'."""
    rows, weights, gradient, ends = draw([2, 3, 0, 1], 32, 64, torch.float32)
    weights, _ = with_main_grads(weights, [torch.float32] * 4)
    sizes = []

    class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend([result.untyped_storage().nbytes()] if isinstance(result, Tensor) else [])
            return result

    with _Sizes():
        torch.autograd.grad(grouped_linear(rows, ends, weights), weights, gradient)
    assert max(sizes) == weights[0].numel() * 4
