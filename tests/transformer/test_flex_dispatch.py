"""The flex dispatcher with stand-ins for its libraries."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe import fused_a2a
from support import flex_libraries
from support.launchers import RANK_SCRIPTS, RunRanks
from torch import Tensor

from maskmoe.transformer.dispatch.flex import missing_library, select_slots


def test_equals_other_ways_to_dispatch(tmp_path: Path, run_ranks: RunRanks) -> None:
    run_ranks(RANK_SCRIPTS / "flex_ranks.py", tmp_path)


@given(
    num_selected=st.lists(st.integers(0, 4), max_size=6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_slots_hold_the_selected_experts(num_selected: list[int], seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    rank_of_expert = torch.rand(len(num_selected), 6, generator=generator).argsort(dim=1)
    routing_map = rank_of_expert < torch.tensor(num_selected, dtype=torch.int64).unsqueeze(1)
    # Half of the weights are 0, those of selected experts, too.
    probs = (torch.rand(routing_map.shape, generator=generator) - 0.5).relu().to(dtype) * routing_map
    probs.requires_grad_()
    weights, experts = select_slots(routing_map, probs, 4)
    assert (weights.dtype, experts.dtype) == (dtype, torch.int64)
    assert weights.shape == experts.shape == (len(num_selected), 4)
    assert torch.equal(flex_libraries.multihot(experts, 6), routing_map)
    assert torch.equal(flex_libraries.multihot(experts, 6, weights), probs)
    weights.sum().backward()
    assert torch.equal(probs.grad, routing_map.to(dtype))


@pytest.mark.parametrize(
    ("backend", "package"), [("deepep", "deep_ep"), ("hybridep", "deep_ep"), ("ncclep", "transformer-engine")]
)
def test_missing_library_is_named(backend: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_a2a, "te_ep", flex_libraries.te_ep, raising=False)
    for is_installed in (False, True):
        for flag in ("HAVE_DEEP_EP", "HAVE_HYBRIDEP", "HAVE_TE_EP"):
            monkeypatch.setattr(fused_a2a, flag, is_installed)
        assert (package in (missing_library(backend) or "")) is not is_installed
    assert missing_library(backend) is None


def bootstrap_of_later_version(num_topk: int) -> None: ...


def dispatch_of_earlier_version(buffer: Any, tokens: Tensor) -> None: ...


@pytest.mark.parametrize(
    "changed",
    [
        {"ep_bootstrap": bootstrap_of_later_version},
        {"ep_dispatch": dispatch_of_earlier_version},
        {"tex": None},
    ],
    ids=["later", "earlier", "built without NCCL-EP"],
)
def test_transformer_engine_must_fit_megatron(
    changed: dict[str, Callable | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_a2a, "HAVE_TE_EP", True)
    monkeypatch.setattr(fused_a2a, "te_ep", flex_libraries.te_ep, raising=False)
    for name, value in changed.items():
        monkeypatch.setattr(flex_libraries.te_ep, name, value)
    assert missing_library("ncclep") is not None
