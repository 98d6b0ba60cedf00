"""Compares drawn experts with the model's routing rule, and rows and time of a cluster with sums by hand."""

import numpy as np
import pytest
import torch
from dispatch_traffic import NO_EXPERT, VisibleLists, rows_to_ranks
from hypothesis import given
from hypothesis import strategies as st
from support import small_moe
from support.small_cases import make_cluster

from maskmoe.transformer.selection import routing_map_of, select_experts


@given(st.data(), st.integers(0, 2**32))
def test_a_router_with_the_right_scores_selects_what_is_drawn(data, seed):
    """The drawn experts get higher scores than all others; then the rule of the model must select exactly these."""
    num_experts, vocab_size = data.draw(st.integers(2, 16)), data.draw(st.integers(1, 6))
    topk = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    sets = rng.random((vocab_size, num_experts)) < rng.random((vocab_size, 1))
    sets[np.arange(vocab_size), rng.integers(num_experts, size=vocab_size)] = True
    token_ids = rng.integers(vocab_size, size=12)
    experts = VisibleLists(small_moe.make_mask(sets[None])).draw(token_ids, topk, rng)  # [k, tokens]
    drawn = np.zeros((len(token_ids), num_experts + 1))
    drawn[np.arange(len(token_ids)), experts] = 1  # `NO_EXPERT` falls into the last column
    scores = torch.from_numpy(drawn[:, :-1] + rng.random((len(token_ids), num_experts)))
    seen = torch.from_numpy(sets[token_ids])
    selected = routing_map_of(select_experts(scores, seen, topk), seen)
    assert np.array_equal(selected.numpy(), drawn[:, :-1].astype(bool))
    assert ((experts == NO_EXPERT).sum(axis=0) == np.maximum(topk - sets[token_ids].sum(axis=1), 0)).all()


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


@given(st.integers(0, 2**32), st.sampled_from([(8, 4, 2), (8, 8, 2), (6, 6, 3), (4, 2, 4)]))
def test_a_token_crosses_once_to_each_node(seed, sizes):
    """Both groups of ranks have two experts a rank; the way of each token is walked hop by hop."""
    cluster, rng = make_cluster(*sizes), np.random.default_rng(seed)
    num_gpus, ep_size, _ = sizes
    num_nodes = cluster.nodes_per_group
    on_node = ep_size // num_nodes
    hops, per_rank = np.zeros((2, num_gpus, ep_size), int)
    per_node = np.zeros((num_gpus, num_nodes), int)
    for rank in range(num_gpus):
        experts = np.stack([rng.choice([*range(2 * ep_size), NO_EXPERT], 3, replace=False) for _ in range(5)], axis=1)
        per_rank[rank] = rows_to_ranks(experts, ep_size, 2)[1]
        per_node[rank] = rows_to_ranks(experts, num_nodes, 2 * on_node)[1]
        group, own = rank // ep_size * ep_size, rank % ep_size
        for token in experts.T:
            targets = {expert // 2 for expert in token if expert != NO_EXPERT}
            for node in {target // on_node for target in targets}:
                first = node * on_node + own % on_node  # the GPU with the sender's number
                hops[rank, first] += node != own // on_node
                for target in targets:
                    if target // on_node == node:
                        hops[group + (own if node == own // on_node else first), target] += 1
    assert np.array_equal(cluster.through_nodes(per_rank, per_node), hops)
