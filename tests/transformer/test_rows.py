"""Copies of rows, their sums, their exchange, and their way to the experts, against loops and autograd."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils
from support.small_moe import DEVICE
from torch import Size, Tensor

from maskmoe.transformer.dispatch.rows import CopyRows, RowCopies

FEATURES = 3


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Draw which rows are copied to which targets: bool [rows, columns]."""
    rows, targets = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    elements = draw(st.lists(st.booleans(), min_size=rows * targets, max_size=rows * targets))
    return torch.tensor(elements, dtype=torch.bool, device=DEVICE).view(rows, targets)


def copies_of(chosen: Tensor) -> RowCopies:
    return RowCopies.from_map(chosen, int(chosen.sum()), has_every_row=bool(chosen.any(dim=1).all()))


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw small whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 8, shape, device=DEVICE).to(dtype)


@given(chosen=maps(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_copy_and_sum(chosen: Tensor, dtype: torch.dtype) -> None:
    expected = [(row, target) for target in range(chosen.shape[1]) for row in range(len(chosen)) if chosen[row, target]]
    rows = torch.tensor([row for row, _ in expected], dtype=torch.int64, device=DEVICE)
    copies = copies_of(chosen)
    assert copies.source.tolist() == [row * chosen.shape[1] + target for row, target in expected]

    values = whole_numbers(len(chosen), FEATURES, dtype=dtype).requires_grad_()
    taken = copies.copy(values).copies
    assert torch.equal(taken, values[rows])
    gradient = whole_numbers(*taken.shape, dtype=dtype)
    taken.backward(gradient)
    sums = torch.zeros_like(values).index_add(0, rows, gradient)
    assert torch.equal(values.grad, sums)
    assert torch.equal(copies.sum_copies(gradient), sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_rounded(dtype: torch.dtype) -> None:
    copies = copies_of(torch.ones(200, 2, dtype=torch.bool, device=DEVICE))
    values = torch.randn(400, FEATURES, device=DEVICE).to(dtype)
    assert torch.equal(copies.sum_copies(values), (values[:200].float() + values[200:].float()).to(dtype))


@pytest.mark.parametrize("is_permutation", [True, False])
def test_permutation_is_recognized(is_permutation: bool) -> None:
    copied = torch.eye(3, dtype=torch.bool, device=DEVICE)[[1, 2, 0]]
    copied[0, 0] = not is_permutation
    assert copies_of(copied).is_permutation is is_permutation


def permute(rows: Tensor, weights: Tensor, chosen: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do in plain torch what Transformer Engine's `moe_permute_with_probs` does."""
    targets, sources = chosen.t().nonzero(as_tuple=True)
    assert len(sources) == num_out_tokens > 0
    row_id_map = torch.full((len(rows), 2 * chosen.shape[1] + 1), 99, dtype=torch.int32)
    for row in range(len(rows)):
        positions = (sources == row).nonzero().flatten().flip(0)
        row_id_map[row, : len(positions)] = positions
        row_id_map[row, -1] = len(positions)
    weights_of_copies = weights[sources, targets]
    # The kernel takes a copy of weight 0 for padding.
    return rows[sources] * (weights_of_copies != 0).unsqueeze(1), weights_of_copies, row_id_map


def unpermute(copies: Tensor, row_id_map: Tensor, restore_shape: Size) -> Tensor:
    """Do in plain torch what Transformer Engine's `moe_unpermute` does."""
    return torch.stack([copies[row[: row[-1]]].sum(dim=0) for row in row_id_map]).view(restore_shape)


@pytest.fixture(params=[False, True], ids=["torch", "transformer engine"])
def uses_transformer_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Return whether a stand-in for Transformer Engine copies the rows."""
    monkeypatch.setattr(moe_utils, "fused_permute_with_probs", permute)
    monkeypatch.setattr(moe_utils, "fused_unpermute", unpermute)
    return request.param


@given(chosen=maps())
def test_rows_to_ranks(uses_transformer_engine: bool, chosen: Tensor) -> None:
    """Whole numbers have exact sums, so any order of additions gives the same bits."""
    targets, sources = chosen.t().nonzero(as_tuple=True)
    rows = whole_numbers(len(chosen), FEATURES).requires_grad_()
    copied = CopyRows(uses_transformer_engine).to_ranks(rows, chosen, len(sources))
    assert torch.equal(copied.copies, rows[sources])
    assert copied.values.tolist() == (sources * chosen.shape[1] + targets).tolist()

    sums = copied.sum_copies(copied.copies)
    copies_of_row = chosen.sum(dim=1, keepdim=True)
    assert torch.equal(sums, rows * copies_of_row)
    (gradient,) = torch.autograd.grad(sums.sum(), rows)
    assert torch.equal(gradient, copies_of_row.expand_as(rows).float())


@st.composite
def choices(draw: st.DrawFn) -> Tensor:
    """Draw which local experts are chosen for each row: bool [rows, experts], at least one in each row."""
    num_experts, num_rows = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    chosen = torch.zeros(num_rows, num_experts, dtype=torch.bool, device=DEVICE)
    for row in range(num_rows):
        chosen[row, list(draw(st.sets(st.integers(0, num_experts - 1), min_size=1)))] = True
    return chosen


@given(chosen=choices())
def test_rows_to_experts(uses_transformer_engine: bool, chosen: Tensor) -> None:
    """Whole numbers have exact sums, so any order of additions gives the same bits."""
    targets, sources = chosen.t().nonzero(as_tuple=True)
    rows = torch.randint(-8, 8, (len(chosen), FEATURES), device=DEVICE).float().requires_grad_()
    weights = torch.randint(1, 8, chosen.shape, device=DEVICE).float().requires_grad_()
    copied = CopyRows(uses_transformer_engine).to_experts(rows, weights, chosen, len(sources))
    assert torch.equal(copied.copies, rows[sources])
    assert torch.equal(copied.values, weights[sources, targets])

    sums = copied.sum_copies(copied.copies * copied.values.unsqueeze(1))
    expected = (rows.unsqueeze(1) * (weights * chosen).unsqueeze(2)).sum(dim=1)
    assert torch.equal(sums, expected)
    gradients = torch.autograd.grad(sums.sum(), [rows, weights])
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected.sum(), [rows, weights])))
