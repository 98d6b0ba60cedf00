"""Copies of rows and their sums against loops and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_moe import DEVICE

from maskmoe.transformer.row_copies import RowCopies


@st.composite
def maps(draw) -> torch.Tensor:
    rows, targets = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    elements = draw(st.lists(st.booleans(), min_size=rows * targets, max_size=rows * targets))
    return torch.tensor(elements, dtype=torch.bool, device=DEVICE).view(rows, targets)


def copies_of(copied: torch.Tensor) -> RowCopies:
    return RowCopies.from_map(copied, int(copied.sum()), bool(copied.any(dim=1).all()))


@given(maps())
def test_copies_are_ordered_by_target_then_row(copied):
    expected = [(target, row) for target in range(copied.shape[1]) for row in range(len(copied)) if copied[row, target]]
    copies = copies_of(copied)
    assert list(zip(copies.targets.tolist(), copies.rows.tolist(), strict=True)) == expected


@given(maps(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_take_and_sum(copied, dtype):
    """Whole numbers, of which sums are exact."""
    copies = copies_of(copied)
    values = torch.randint(-8, 8, (len(copied), 3), device=DEVICE).to(dtype).requires_grad_()
    taken = copies.take(values)
    assert torch.equal(taken, values[copies.rows])
    gradient = torch.randint(-8, 8, taken.shape, device=DEVICE).to(dtype)
    taken.backward(gradient)
    expected = torch.zeros_like(values).index_add(0, copies.rows, gradient)
    assert torch.equal(values.grad, expected)

    assert torch.equal(copies.sum_now(gradient), expected)
    assert torch.equal(copies.sum_into(torch.empty_like(expected), gradient), expected)
    assert torch.equal(copies.take_into(torch.empty_like(gradient), values.detach()), taken)


@pytest.mark.parametrize("is_permutation", [True, False])
def test_permutation_is_noticed(is_permutation):
    copied = torch.eye(3, dtype=torch.bool, device=DEVICE)[[1, 2, 0]]
    copied[0, 0] = not is_permutation
    assert copies_of(copied).is_permutation is is_permutation
