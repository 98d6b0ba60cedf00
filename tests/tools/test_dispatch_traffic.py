"""Compares drawn experts with the model's routing rule, rows with loops over tokens, and times with sums by hand."""

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from dispatch_traffic import NO_EXPERT, Reach, VisibleLists, rows_to_ranks
from hypothesis import given
from hypothesis import strategies as st
from support.small_cases import make_cluster
from support.small_moe import make_mask

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
    return visible[token_ids], VisibleLists(make_mask(visible[None])).draw(token_ids, topk, rng)


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
        experts = VisibleLists(make_mask(visible[None])).draw(np.zeros(num_draws, int), topk, np.random.default_rng(0))
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


@st.composite
def clusters_and_rows(draw):
    """Draw a cluster, and the rows between the ranks of its groups."""
    gpus_per_node, ep_size = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    num_gpus = math.lcm(gpus_per_node, ep_size) * draw(st.integers(1, 3))
    rows = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, 5, size=(num_gpus, ep_size))
    return make_cluster(num_gpus, ep_size, gpus_per_node), rows


@given(clusters_and_rows())
def test_rows_by_reach(case):
    cluster, rows = case
    sent, received = np.zeros((2, cluster.num_gpus, 3), np.int64)
    for source, place in np.ndindex(*rows.shape):
        rank = source // cluster.ep_size * cluster.ep_size + place
        is_on_node = source // cluster.gpus_per_node == rank // cluster.gpus_per_node
        reach = Reach.OWN if source == rank else Reach.NODE if is_on_node else Reach.ACROSS
        sent[source, reach] += rows[source, place]
        received[rank, reach] += rows[source, place]
    assert np.array_equal(cluster.sent_by_reach(rows), sent)
    assert np.array_equal(cluster.sent_by_reach(cluster.reverse(rows)), received)


@given(st.integers(0, 2**32))
def test_the_busiest_direction_of_the_busiest_rank_decides(seed):
    rows, slowest = np.random.default_rng(seed).integers(0, 100, size=(8, 4)), 0.0
    for matrix in (rows[:4], rows[4:]):
        for rank in range(4):
            neighbour = rank ^ 1
            others = [other for other in range(4) if other // 2 != rank // 2]
            rows_within = max(matrix[rank, neighbour], matrix[neighbour, rank])
            rows_across = max(matrix[rank, others].sum(), matrix[others, rank].sum())
            slowest = max(slowest, 1e-6 + rows_within * 4096 / 400e9, 2 * 3e-6 + rows_across * 4096 / 50e9)
    assert make_cluster(8, 4, 2).seconds(rows, 4096) == pytest.approx(slowest)


@pytest.mark.parametrize(
    ("ep_size", "gpus_per_node", "nodes"), [(8, 4, 2), (4, 4, 1), (2, 4, 1), (6, 4, None), (3, 4, None), (5, 1, 5)]
)
def test_nodes_of_a_group(ep_size, gpus_per_node, nodes):
    assert make_cluster(math.lcm(ep_size, gpus_per_node), ep_size, gpus_per_node).nodes_per_group == nodes
