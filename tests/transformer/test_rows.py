"""Copies of rows, their sums, and their exchange against loops and autograd."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kernels import kernels_on_cpu
from support.small_moe import DEVICE, process_groups
from torch import Tensor

from maskmoe.transformer.dispatch.rows import RowBuffers, RowCopies, RowExchange, SortedCopies, copies_of_map

FEATURES = 3


@st.composite
def maps(draw: st.DrawFn) -> Tensor:
    """Draw which rows are copied to which targets: bool [rows, columns]."""
    rows, targets = draw(st.integers(0, 7)), draw(st.integers(1, 5))
    elements = draw(st.lists(st.booleans(), min_size=rows * targets, max_size=rows * targets))
    return torch.tensor(elements, dtype=torch.bool, device=DEVICE).view(rows, targets)


def copies_of(chosen: Tensor, columns: slice = slice(None)) -> RowCopies:
    copied = chosen[:, columns]
    has_every_row = bool(copied.any(dim=1).all())
    return copies_of_map(chosen, int(copied.sum()), chosen.shape[1], columns, has_every_row)


@pytest.fixture(params=["torch", "kernels"])
def implementation(request: pytest.FixtureRequest) -> Iterator[type[RowCopies]]:
    """Let `copies_of_map` return each kind of `RowCopies`; return the kind."""
    from maskmoe.transformer.kernels.row_copies import SlottedCopies

    if request.param == "kernels":
        with kernels_on_cpu():
            yield SlottedCopies
    else:
        yield SortedCopies


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw small whole numbers, whose sums are exact in any order."""
    return torch.randint(-8, 8, shape, device=DEVICE).to(dtype)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=maps(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), data=st.data())
def test_copy_and_sum(implementation: type[RowCopies], chosen: Tensor, dtype: torch.dtype, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, chosen.shape[1] - 1))
    columns = slice(first, data.draw(st.integers(first + 1, chosen.shape[1])))
    expected = [
        (row, target) for target in range(chosen.shape[1])[columns] for row in range(len(chosen)) if chosen[row, target]
    ]
    rows = torch.tensor([row for row, _ in expected], dtype=torch.int64, device=DEVICE)
    copies = copies_of(chosen, columns)
    assert isinstance(copies, implementation)
    assert copies.source.tolist() == [row * chosen.shape[1] + target for row, target in expected]
    assert copies.num_rows == len(chosen)

    values = whole_numbers(len(chosen), FEATURES, dtype=dtype).requires_grad_()
    taken = copies.copy_rows_with_gradient(values, RowBuffers())
    assert torch.equal(taken, values[rows])
    gradient = whole_numbers(*taken.shape, dtype=dtype)
    taken.backward(gradient)
    sums = torch.zeros_like(values).index_add(0, rows, gradient)
    assert torch.equal(values.grad, sums)

    assert torch.equal(copies.sum_copies(gradient), sums)
    assert torch.equal(copies.sum_copies(gradient, out=torch.empty_like(sums)), sums)
    assert torch.equal(copies.copy_rows(values.detach(), out=torch.empty_like(gradient)), taken)
    weights = torch.arange(chosen.numel(), device=DEVICE).view_as(chosen)
    assert torch.equal(copies.pick(weights), copies.source.long())
    if chosen[:, columns].any(dim=1).all():
        assert torch.equal(taken.index_select(0, copies.first_copies), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_are_rounded(dtype: torch.dtype) -> None:
    copies = copies_of(torch.ones(200, 2, dtype=torch.bool, device=DEVICE))
    values = torch.randn(400, FEATURES, device=DEVICE).to(dtype)
    assert torch.equal(copies.sum_copies(values), (values[:200].float() + values[200:].float()).to(dtype))


def test_room_for_more_copies_than_there_are(implementation: type[RowCopies]) -> None:
    """Kernels may be given more room, since the host does not yet know the number of copies."""
    chosen = torch.tensor([[True, False], [True, True], [False, False]], device=DEVICE)
    with kernels_on_cpu():
        copies = copies_of_map(chosen, 6, 2)
    values = whole_numbers(3, FEATURES)
    assert torch.equal(copies.copy_rows(values)[:3], values[[0, 1, 1]])
    assert torch.equal(copies.sum_copies(values), torch.stack([values[0], values[1] + values[2], 0 * values[0]]))
    assert copies.pick(torch.arange(6, device=DEVICE).view(3, 2), 3).tolist() == [0, 2, 3]


def test_many_rows_and_targets(implementation: type[RowCopies]) -> None:
    """Rows, targets and features that fill several blocks of the kernels, and not whole ones."""
    chosen = torch.rand(90, 70, device=DEVICE) < 0.05
    copies = copies_of(chosen)
    rows = chosen.t().nonzero()[:, 1]
    values = whole_numbers(90, 300)
    assert torch.equal(copies.copy_rows(values), values[rows])
    assert torch.equal(copies.sum_copies(values[rows]), values * chosen.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("is_permutation", [True, False])
def test_permutation_is_recognized(is_permutation: bool) -> None:
    copied = torch.eye(3, dtype=torch.bool, device=DEVICE)[[1, 2, 0]]
    copied[0, 0] = not is_permutation
    assert copies_of(copied).is_permutation is is_permutation


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(to_ranks=maps())
def test_exchange_with_this_rank_alone(implementation: type[RowCopies], to_ranks: Tensor) -> None:
    """Dispatch copies rows, combine adds the copies, and each is the gradient of the other."""
    exchange = exchange_alone(copies_of(to_ranks))
    rows = to_ranks.t().nonzero()[:, 1]

    values = whole_numbers(len(to_ranks), FEATURES).requires_grad_()
    received = exchange.dispatch(values)
    assert torch.equal(received, values[rows])
    outputs = whole_numbers(*received.shape).requires_grad_()
    received.backward(outputs.detach())
    sums = torch.zeros_like(values).index_add(0, rows, outputs.detach())
    assert torch.equal(values.grad, sums)

    combined = exchange.combine(outputs)
    assert torch.equal(combined, sums)
    combined.backward(values.detach())
    assert torch.equal(outputs.grad, values.detach()[rows])


def exchange_alone(copies: RowCopies) -> RowExchange:
    """Return an exchange of this rank with itself."""
    counts = SimpleNamespace(rows_to=(len(copies.source),), rows_from=(len(copies.source),))
    return RowExchange(process_groups().ep, RowBuffers(), copies, counts)


def test_reused_buffers_keep_earlier_sums() -> None:
    exchange = exchange_alone(SortedCopies.permutations(torch.tensor([[2, 0, 1]], device=DEVICE))[0])
    first, second = whole_numbers(3, FEATURES), whole_numbers(3, FEATURES) + 100
    combined = exchange.combine(exchange.dispatch(first))
    exchange.combine(exchange.dispatch(second))
    assert torch.equal(combined, first)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="only buffers on the host are reused")
def test_overwritten_rows_that_autograd_saved_are_an_error() -> None:
    exchange = exchange_alone(SortedCopies.permutations(torch.tensor([[2, 0, 1]], device=DEVICE))[0])
    weight = whole_numbers(FEATURES, FEATURES).requires_grad_()
    product = exchange.dispatch(whole_numbers(3, FEATURES).requires_grad_()) @ weight
    exchange.dispatch(whole_numbers(3, FEATURES))
    with pytest.raises(RuntimeError, match="modified inplace"):
        product.sum().backward()


def test_buffers_grow_and_are_reused() -> None:
    buffers, like = RowBuffers(), torch.empty(1, FEATURES)
    large = buffers.get("send", like, 5)
    assert large.shape == (5, FEATURES)
    assert buffers.get("send", like, 2).data_ptr() == large.data_ptr()
    assert buffers.get("receive", like, 2).data_ptr() != large.data_ptr()
    assert buffers.get("send", like.double(), 2).dtype == torch.float64
    assert buffers.get("send", like, 9).shape == (9, FEATURES)
