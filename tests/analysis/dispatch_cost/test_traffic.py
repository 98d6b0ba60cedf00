"""Compares the rows between ranks with loops over tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.small_cases import selected_experts, tables

from maskmoe.analysis.dispatch_cost.cluster import Layout, Reach
from maskmoe.analysis.dispatch_cost.dispatch import Traffic, rows_of_choices


@st.composite
def dispatches(draw, rank_local: bool = False):
    """Return a table, its number of ranks, token ids [sources, tokens], k, and the choices of experts."""
    table, visible, num_ranks = draw(tables(rank_local))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, num_ranks)), draw(st.integers(1, 6))
    token_ids, topk = rng.integers(len(visible), size=shape), draw(st.integers(1, 8))
    return table, num_ranks, token_ids, topk, list(table.choose(token_ids.ravel(), topk, rng))


def count_rows(case) -> tuple[np.ndarray, np.ndarray]:
    table, num_ranks, token_ids, _, choices = case
    return rows_of_choices(choices, token_ids.shape, num_ranks, table.num_experts // num_ranks)


@given(dispatches())
def test_rows_of_choices(case):
    table, num_ranks, token_ids, _, choices = case
    per_expert, per_rank = np.zeros((2, len(token_ids), num_ranks), np.int64)
    for token, experts in selected_experts(choices).items():
        ranks = [expert // (table.num_experts // num_ranks) for expert in experts]
        for rank in ranks:
            per_expert[token // token_ids.shape[1], rank] += 1
        for rank in set(ranks):
            per_rank[token // token_ids.shape[1], rank] += 1
    assert np.array_equal(count_rows(case), (per_expert, per_rank))


@given(dispatches())
def test_one_copy_is_never_more(case):
    table, _, token_ids, topk, _ = case
    per_expert, per_rank = count_rows(case)
    assert (per_rank <= per_expert).all()
    assert ((per_rank > 0) == (per_expert > 0)).all()
    num_selected = np.minimum(table.num_visible[table.row_of_id[token_ids]], topk)
    assert np.array_equal(per_expert.sum(axis=1), num_selected.sum(axis=1))


@given(dispatches(rank_local=True))
def test_rank_local_tokens_are_one_row_each_whatever_is_chosen(case):
    table, num_ranks, token_ids, topk, _ = case
    per_expert, per_rank = count_rows(case)
    rank_of_set = table.experts[np.cumsum(table.num_visible) - 1] // (table.num_experts // num_ranks)
    rows = table.row_of_id[token_ids]
    for source, sets in enumerate(rows):
        tokens_to_rank = np.bincount(rank_of_set[sets], minlength=num_ranks)
        experts_on_rank = np.bincount(rank_of_set[sets], np.minimum(table.num_visible[sets], topk), num_ranks)
        assert np.array_equal(per_rank[source], tokens_to_rank)
        assert np.array_equal(per_expert[source], experts_on_rank)


@st.composite
def layouts(draw) -> Layout:
    gpus_per_node, ep_size = draw(st.integers(1, 6)), draw(st.integers(2, 6))
    num_gpus = np.lcm(gpus_per_node, ep_size) * draw(st.integers(1, 3))
    return Layout(int(num_gpus), ep_size, gpus_per_node)


@given(layouts(), st.integers(0, 2**32))
def test_counted_by_reach(layout, seed):
    """The rows are added in blocks of random size and compared with a loop over pairs of ranks."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 5, size=(layout.num_gpus, layout.ep_size))
    sent, received = np.zeros((2, layout.num_gpus, 3), np.int64)
    for source in range(layout.num_gpus):
        for place in range(layout.ep_size):
            rank = source // layout.ep_size * layout.ep_size + place
            is_on_node = source // layout.gpus_per_node == rank // layout.gpus_per_node
            reach = Reach.OWN if source == rank else Reach.NODE if is_on_node else Reach.ACROSS
            sent[source, reach] += rows[source, place]
            received[rank, reach] += rows[source, place]

    traffic, start = Traffic.empty(layout), 0
    while start < layout.num_gpus:
        end = start + int(rng.integers(1, layout.ep_size - start % layout.ep_size + 1))
        traffic.add(range(start, end), rows[start:end])
        start = end
    assert np.array_equal(traffic.sent, sent)
    assert np.array_equal(traffic.received, received)
    assert np.array_equal(traffic.sent.sum(axis=0), traffic.received.sum(axis=0))


@given(layouts())
def test_one_row_to_every_peer(layout):
    expected = Traffic.empty(layout)
    for first in range(0, layout.num_gpus, layout.ep_size):
        expected.add(range(first, first + layout.ep_size), 1 - np.eye(layout.ep_size, dtype=np.int64))
    assert np.array_equal(layout.num_peers, expected.sent)
    assert np.array_equal(layout.num_peers, expected.received)
