"""The selection of experts against the definition of the method, token by token."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.transformer.selection import routing_map_of, select_experts

TOKENS = 12


def draw_tokens(seed: int, num_experts: int, num_distinct: int | None = None) -> tuple[Tensor, Tensor]:
    """Draw scores, float32 [tokens, experts], and visible sets of every size.

    Args:
        seed: the same seed draws the same tokens.
        num_experts: the number of experts.
        num_distinct: the number of different scores, so that experts tie; None: no two scores are equal.
    """
    rng = np.random.default_rng(seed)
    num_scores = TOKENS * num_experts
    scores = rng.permutation(num_scores) if num_distinct is None else rng.integers(0, num_distinct, num_scores)
    order = rng.random((TOKENS, num_experts)).argsort(axis=1)
    visible = order < rng.integers(1, num_experts + 1, (TOKENS, 1))
    scores = scores.reshape(TOKENS, num_experts).astype(np.float32)
    return torch.from_numpy(scores).to(DEVICE), torch.from_numpy(visible).to(DEVICE)


def selected_visible(scores: Tensor, visible: Tensor, topk: int, **groups: int) -> list[list[int]]:
    """Return the visible experts that are selected for each token, in ascending order."""
    selected = select_experts(scores, visible, topk, **groups)
    assert selected.shape == (len(scores), topk)
    assert all(len(set(experts)) == topk for experts in selected.tolist())
    selected_map = routing_map_of(selected, visible)
    assert not (selected_map & ~visible).any()
    return [row.nonzero().flatten().tolist() for row in selected_map]


@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(1, 12),
    num_distinct=st.sampled_from([None, 1, 2, 5]),
    invisible_score=st.sampled_from([None, -np.inf, 0, 1e30, np.nan]),
    data=st.data(),
)
def test_selects_the_best_visible_experts(seed, num_experts, num_distinct, invisible_score, data) -> None:
    """A token selects `min(k, V)` visible experts, whatever the scores of invisible experts are."""
    topk = data.draw(st.integers(1, num_experts))
    scores, visible = draw_tokens(seed, num_experts, num_distinct)
    given_scores = scores if invisible_score is None else scores.masked_fill(~visible, invisible_score)
    for token, experts in enumerate(selected_visible(given_scores, visible, topk)):
        best = sorted(scores[token, visible[token]].tolist(), reverse=True)[:topk]
        # Any of several tied experts may be selected, so compare scores.
        assert sorted(scores[token, experts].tolist(), reverse=True) == best


@pytest.mark.parametrize("groups", [{}, {"num_groups": 5, "group_topk": 2}], ids=["", "groups"])
def test_scores_without_a_value_select_visible_experts(groups: dict[str, int]) -> None:
    """A model that has diverged must report NaN losses instead of failing in the dispatcher."""
    scores, visible = draw_tokens(0, 20)
    found = selected_visible(torch.full_like(scores, torch.nan), visible, 4, **groups)
    for experts, num_visible in zip(found, visible.sum(dim=1).tolist(), strict=True):
        assert 1 <= len(experts) <= min(4, num_visible)
        assert groups or len(experts) == min(4, num_visible)
