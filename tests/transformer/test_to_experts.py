"""Copies of received rows to the experts in all ways, and rows that autograd saves once."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe import moe_utils
from support.kernels import kernels_on_cpu
from support.small_moe import DEVICE
from torch import Size, Tensor

from maskmoe.transformer.dispatch.rows import RowBuffers
from maskmoe.transformer.dispatch.to_experts import CopyToExperts, SavedByExperts

FEATURES = 4


def permute(rows: Tensor, weights: Tensor, chosen: Tensor, num_out_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Do in plain torch what Transformer Engine's `moe_permute_with_probs` does."""
    targets, sources = chosen.t().nonzero(as_tuple=True)
    assert len(sources) == num_out_tokens > 0
    row_id_map = torch.full((len(rows), 2 * chosen.shape[1] + 1), 99, dtype=torch.int32)
    for row in range(len(rows)):
        positions = (sources == row).nonzero().flatten().flip(0)
        row_id_map[row, : len(positions)] = positions
        row_id_map[row, -1] = len(positions)
    return rows[sources], weights[sources, targets], row_id_map


def unpermute(copies: Tensor, row_id_map: Tensor, restore_shape: Size) -> Tensor:
    """Do in plain torch what Transformer Engine's `moe_unpermute` does."""
    return torch.stack([copies[row[: row[-1]]].sum(dim=0) for row in row_id_map]).view(restore_shape)


@pytest.fixture(params=["torch", "kernels", "transformer engine"])
def make_copier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable]:
    """Return a function that makes a `CopyToExperts` which copies in one of the ways."""
    monkeypatch.setattr(moe_utils, "fused_permute_with_probs", permute)
    monkeypatch.setattr(moe_utils, "fused_unpermute", unpermute)

    def make(experts: slice, topk: int) -> CopyToExperts:
        return CopyToExperts(experts, topk, RowBuffers(), request.param == "transformer engine")

    if request.param == "kernels":
        with kernels_on_cpu():
            yield make
    else:
        yield make


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, slice]:
    """Draw which experts are chosen for each row: bool [rows, experts], at least one of the local experts."""
    num_experts, num_rows = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    first = draw(st.integers(0, num_experts - 1))
    local = slice(first, draw(st.integers(first + 1, num_experts)))
    chosen = torch.zeros(num_rows, num_experts, dtype=torch.bool, device=DEVICE)
    for row in range(num_rows):
        experts = draw(st.sets(st.integers(local.start, local.stop - 1), min_size=1))
        chosen[row, list(experts)] = True
    return chosen, local


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choice=choices())
def test_copies_and_sums(make_copier: Callable, choice: tuple[Tensor, slice]) -> None:
    """Whole numbers have exact sums, so any order of additions gives the same bits."""
    chosen, local = choice
    targets, sources = chosen.t().nonzero(as_tuple=True)
    rows = torch.randint(-8, 8, (len(chosen), FEATURES), device=DEVICE).float().requires_grad_()
    weights = torch.randint(1, 8, chosen.shape, device=DEVICE).float().requires_grad_()
    expert_rows = make_copier(local, chosen.shape[1])(rows, weights, chosen, len(sources))
    assert torch.equal(expert_rows.values, rows[sources])
    assert torch.equal(expert_rows.weights, weights[sources, targets])
    assert torch.equal(expert_rows.values[expert_rows.first_copies], rows)

    outputs = expert_rows.values * expert_rows.weights.unsqueeze(1)
    sums = expert_rows.sum_outputs(outputs)
    expected = (rows.unsqueeze(1) * (weights * chosen).unsqueeze(2)).sum(dim=1)
    assert torch.equal(sums, expected)
    gradients = torch.autograd.grad(sums.sum(), [rows, weights])
    assert all(map(torch.equal, gradients, torch.autograd.grad(expected.sum(), [rows, weights])))


def test_router_saves_no_rows(make_copier: Callable) -> None:
    chosen = torch.tensor([[True, False, True], [False, True, False]], device=DEVICE)
    rows = torch.randn(2, FEATURES, device=DEVICE).requires_grad_()
    weight = torch.randn(3, FEATURES, device=DEVICE).requires_grad_()
    expected = torch.autograd.grad((rows.unsqueeze(1) @ weight.t()).sin().sum(), [rows, weight])

    received = rows.clone()
    saved = SavedByExperts(received)
    with saved.while_routing():
        logits = (received.unsqueeze(1) @ weight.t()).sin()
    saved.keep(make_copier(slice(0, 3), 2)(received, logits.squeeze(1), chosen, 3))
    with torch.no_grad():
        received.zero_()  # as where the next exchange overwrites the buffer
    gradients = torch.autograd.grad(logits.sum(), [rows, weight])
    assert all(map(torch.equal, gradients, expected))
