"""Compares the choice of experts with loops over tokens."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.small_cases import count, make_mask, mask_of, selected_experts, tables, write_data

from maskmoe.analysis.dispatch_cost.routing import VisibleTable, draw_subsets
from maskmoe.routing_mask.mask import expected_expert_load


@pytest.mark.parametrize(("size", "num_items"), [(1, 4), (2, 4), (3, 4), (4, 4), (2, 7)])
def test_all_subsets_are_equally_likely(size, num_items):
    num_draws = 30_000
    drawn = Counter(frozenset(s) for s in draw_subsets(np.random.default_rng(0), num_draws, size, num_items).T.tolist())
    expected = list(map(frozenset, combinations(range(num_items), size)))
    assert drawn.keys() == set(expected)
    mean = num_draws / len(expected)
    assert all(abs(times - mean) < 5 * mean**0.5 for times in drawn.values())


def test_subsets_of_more_items_than_fit_16_bits():
    drawn = draw_subsets(np.random.default_rng(0), 50, 3, 200_000)
    assert (1 << 16) < drawn.max() < 200_000


@given(tables(), st.integers(1, 8), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 2**32))
def test_every_token_selects_min_k_v_visible_experts(case, topk, token_ids, seed):
    table, visible, _ = case
    token_ids = np.array(token_ids, np.int64) % len(visible)
    selected = selected_experts(list(table.choose(token_ids, topk, np.random.default_rng(seed))))
    assert sorted(selected) == list(range(len(token_ids)))
    for token, experts in selected.items():
        visible_of_token = visible[token_ids[token]]
        assert len(set(experts)) == len(experts) == min(topk, visible_of_token.sum())
        assert visible_of_token[experts].all()


@given(tables(), st.integers(1, 8), st.integers(0, 2**32))
def test_expected_load(case, topk, seed):
    _, visible, num_ranks = case
    assume(visible.shape[1] > 1)
    occurrences = np.random.default_rng(seed).integers(0, 100, size=len(visible))
    expected = np.zeros(num_ranks)
    for visible_of_id, times in zip(visible, occurrences, strict=True):
        num_visible = visible_of_id.sum()
        for expert in np.flatnonzero(visible_of_id):
            expected[expert // (visible.shape[1] // num_ranks)] += times * min(topk, num_visible) / num_visible
    expert_load = expected_expert_load(mask_of(visible), occurrences, topk)[0]
    np.testing.assert_allclose(expert_load.reshape(num_ranks, -1).sum(axis=1), expected)


def test_layers_of_a_mask(tmp_path):
    mask = make_mask(count(write_data(tmp_path)), num_experts=12, frequent_visible=5, num_layers=2)
    for layer in range(2):
        table = VisibleTable.of_layer(mask, layer)
        token_ids = np.arange(mask.vocab_size)
        selected = selected_experts(list(table.choose(token_ids, 12, np.random.default_rng(0))))
        for token_id, visible_of_id in enumerate(mask.visible_sets(layer)):
            assert sorted(selected[token_id]) == np.flatnonzero(visible_of_id).tolist()
