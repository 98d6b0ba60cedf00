"""Compares drawn experts with the routing rule of the model, and rows between ranks with loops over tokens."""

from collections import Counter
from itertools import combinations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.small_cases import mask_of

from maskmoe.analysis.dispatch_traffic import NO_EXPERT, VisibleLists, rows_to_ranks
from maskmoe.transformer.selection import routing_map_of, select_experts


@st.composite
def draws(draw):
    """Return the visible sets of tokens, bool [tokens, N], and the experts that were drawn for them, [k, tokens]."""
    num_experts, vocab_size = draw(st.integers(2, 16)), draw(st.integers(1, 6))
    topk = draw(st.integers(1, num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    visible = rng.random((vocab_size, num_experts)) < rng.random((vocab_size, 1))
    visible[np.arange(vocab_size), rng.integers(num_experts, size=vocab_size)] = True
    token_ids = rng.integers(vocab_size, size=draw(st.integers(1, 12)))
    return visible[token_ids], VisibleLists(mask_of(visible)).draw(token_ids, topk, rng)


@given(draws(), st.integers(0, 2**32))
def test_a_router_with_the_right_scores_selects_what_is_drawn(case, seed):
    """The drawn experts get higher scores than all others; then the rule of the model must select exactly these."""
    visible, experts = case
    drawn = np.zeros((len(visible), visible.shape[1] + 1))
    drawn[np.arange(len(visible)), experts] = 1  # `NO_EXPERT` falls into the last column
    scores = torch.from_numpy(drawn[:, :-1] + np.random.default_rng(seed).random(visible.shape))
    seen = torch.from_numpy(visible)
    selected = routing_map_of(select_experts(scores, seen, len(experts)), seen)
    assert np.array_equal(selected.numpy(), drawn[:, :-1].astype(bool))
    assert ((experts == NO_EXPERT).sum(axis=0) == np.maximum(len(experts) - visible.sum(axis=1), 0)).all()


def test_all_subsets_are_equally_likely():
    visible = np.array([[1, 0, 1, 1, 1, 0, 1, 1]], bool)
    for topk in (1, 2, 5):
        num_draws = 30_000
        experts = VisibleLists(mask_of(visible)).draw(np.zeros(num_draws, int), topk, np.random.default_rng(0))
        drawn = Counter(map(frozenset, experts.T.tolist()))
        expected = list(map(frozenset, combinations(np.flatnonzero(visible[0]).tolist(), topk)))
        assert drawn.keys() == set(expected)
        mean = num_draws / len(expected)
        assert all(abs(times - mean) < 5 * mean**0.5 for times in drawn.values())


@given(draws(), st.integers(1, 4))
def test_rows_to_ranks(case, experts_per_rank):
    visible, experts = case
    num_ranks = -(-visible.shape[1] // experts_per_rank)
    per_expert, per_rank = np.zeros((2, num_ranks), int)
    for of_token in experts.T.tolist():
        ranks = [expert // experts_per_rank for expert in of_token if expert != NO_EXPERT]
        for rank in ranks:
            per_expert[rank] += 1
        for rank in set(ranks):
            per_rank[rank] += 1
    found = rows_to_ranks(experts, num_ranks, experts_per_rank)
    assert np.array_equal(found, (per_expert, per_rank))
