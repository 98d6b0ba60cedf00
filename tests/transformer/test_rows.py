"""Copies of rows, their sums, and their exchange against loops and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_moe import DEVICE, process_groups
from torch import Tensor

from maskmoe.transformer.dispatch.rows import RowBuffers, RowCopies, RowExchange

FEATURES = 3


@st.composite
def maps(draw: st.DrawFn, min_targets: int = 1) -> Tensor:
    """Draw which rows are copied to which targets: bool [rows, targets]."""
    rows, targets = draw(st.integers(0, 7)), draw(st.integers(min_targets, 5))
    elements = draw(st.lists(st.booleans(), min_size=rows * targets, max_size=rows * targets))
    return torch.tensor(elements, dtype=torch.bool, device=DEVICE).view(rows, targets)


def copies_of(copied: Tensor) -> RowCopies:
    return RowCopies.from_map(copied, int(copied.sum()), bool(copied.any(dim=1).all()))


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw small whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 8, shape, device=DEVICE).to(dtype)


@given(maps())
def test_copies_are_ordered_by_target_then_row(copied: Tensor) -> None:
    expected = [(target, row) for target in range(copied.shape[1]) for row in range(len(copied)) if copied[row, target]]
    copies = copies_of(copied)
    assert list(zip(copies.targets.tolist(), copies.rows.tolist(), strict=True)) == expected


@given(maps(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_copy_and_sum(copied: Tensor, dtype: torch.dtype) -> None:
    copies = copies_of(copied)
    values = whole_numbers(len(copied), FEATURES, dtype=dtype).requires_grad_()
    taken = copies.copy_rows_with_gradient(values)
    assert torch.equal(taken, values[copies.rows])
    gradient = whole_numbers(*taken.shape, dtype=dtype)
    taken.backward(gradient)
    expected = torch.zeros_like(values).index_add(0, copies.rows, gradient)
    assert torch.equal(values.grad, expected)

    assert torch.equal(copies.sum_copies(gradient), expected)
    assert torch.equal(copies.sum_copies(gradient, out=torch.empty_like(expected)), expected)
    assert torch.equal(copies.copy_rows(values.detach(), out=torch.empty_like(gradient)), taken)


@pytest.mark.parametrize("is_permutation", [True, False])
def test_permutation_is_recognized(is_permutation: bool) -> None:
    copied = torch.eye(3, dtype=torch.bool, device=DEVICE)[[1, 2, 0]]
    copied[0, 0] = not is_permutation
    assert copies_of(copied).is_permutation is is_permutation


@given(maps(), st.data())
def test_exchange_with_this_rank_alone(to_ranks: Tensor, data: st.DataObject) -> None:
    """Dispatch copies rows twice, combine adds the copies twice, and each is the gradient of the other."""
    sent = copies_of(to_ranks)
    num_sent = len(sent.rows)
    elements = data.draw(st.lists(st.booleans(), min_size=2 * num_sent, max_size=2 * num_sent))
    fan_out = copies_of(torch.tensor(elements, dtype=torch.bool, device=DEVICE).view(num_sent, 2))
    exchange = RowExchange(process_groups().ep, RowBuffers(), sent, (num_sent,), (num_sent,), fan_out)
    row_of_copy = sent.rows[fan_out.rows]

    values = whole_numbers(len(to_ranks), FEATURES).requires_grad_()
    received = exchange.dispatch(values)
    assert torch.equal(received, values[row_of_copy])
    outputs = whole_numbers(*received.shape).requires_grad_()
    received.backward(outputs.detach())
    sums = torch.zeros_like(values).index_add(0, row_of_copy, outputs.detach())
    assert torch.equal(values.grad, sums)

    combined = exchange.combine(outputs)
    assert torch.equal(combined, sums)
    combined.backward(values.detach())
    assert torch.equal(outputs.grad, values.detach()[row_of_copy])


@pytest.mark.parametrize("fans_out", [False, True])
def test_reused_buffers_keep_earlier_results(fans_out: bool) -> None:
    order = RowCopies.permutation(torch.tensor([2, 0, 1], device=DEVICE))
    fan_out = copies_of(torch.ones(3, 2, dtype=torch.bool, device=DEVICE)) if fans_out else None
    exchange = RowExchange(process_groups().ep, RowBuffers(), order, (3,), (3,), fan_out)
    first, second = whole_numbers(3, FEATURES), whole_numbers(3, FEATURES) + 100
    dispatched = exchange.dispatch(first)
    expected = dispatched.clone()
    combined = exchange.combine(dispatched)
    expected_sums = combined.clone()
    exchange.combine(exchange.dispatch(second))
    assert torch.equal(dispatched, expected)
    assert torch.equal(combined, expected_sums)


def test_buffers_grow_and_are_reused() -> None:
    buffers, like = RowBuffers(), torch.empty(1, FEATURES)
    large = buffers.get("send", like, 5)
    assert large.shape == (5, FEATURES)
    assert buffers.get("send", like, 2).data_ptr() == large.data_ptr()
    assert buffers.get("receive", like, 2).data_ptr() != large.data_ptr()
    assert buffers.get("send", like.double(), 2).dtype == torch.float64
    assert buffers.get("send", like, 9).shape == (9, FEATURES)
