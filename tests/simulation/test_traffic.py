"""Compares the rows between ranks with loops over tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.small_cases import selected_experts, tables

from maskmoe.simulation.layout import Layout, Reach
from maskmoe.simulation.traffic import RowsBetween, Traffic, TrafficCounter, planned_rows, rows_of_choices


@st.composite
def dispatches(draw, rank_local: bool = False):
    """Return a table, its number of ranks, token ids [sources, tokens], k, and the choices of experts."""
    table, visible, num_ranks = draw(tables(rank_local))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, num_ranks)), draw(st.integers(1, 6))
    token_ids, topk = rng.integers(len(visible), size=shape), draw(st.integers(1, 8))
    return table, num_ranks, token_ids, topk, list(table.choose(token_ids.ravel(), topk, rng))


def count_rows(case) -> RowsBetween:
    table, num_ranks, token_ids, _, choices = case
    return rows_of_choices(choices, *token_ids.shape, num_ranks, table.num_experts // num_ranks)


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
    rows = count_rows(case)
    assert np.array_equal(rows.per_expert, per_expert)
    assert np.array_equal(rows.per_rank, per_rank)


@given(dispatches())
def test_one_copy_is_never_more(case):
    table, _, token_ids, topk, _ = case
    rows = count_rows(case)
    assert (rows.per_rank <= rows.per_expert).all()
    assert ((rows.per_rank > 0) == (rows.per_expert > 0)).all()
    assert np.array_equal(rows.per_expert.sum(axis=1), table.num_selected(token_ids, topk).sum(axis=1))


@given(dispatches(rank_local=True))
def test_rank_local_tokens_are_one_row_each_whatever_is_chosen(case):
    table, num_ranks, token_ids, topk, _ = case
    rows = count_rows(case)
    assert (rows.per_rank.sum(axis=1) == token_ids.shape[1]).all()
    rank_of_set = table.experts[np.cumsum(table.num_visible) - 1] // (table.num_experts // num_ranks)
    planned = planned_rows(rank_of_set[table.row_of_id[token_ids]], table.num_selected(token_ids, topk), num_ranks)
    assert np.array_equal(planned.per_rank, rows.per_rank)
    assert np.array_equal(planned.per_expert, rows.per_expert)


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

    counter, start = TrafficCounter(layout), 0
    while start < layout.num_gpus:
        end = start + int(rng.integers(1, layout.ep_size - start % layout.ep_size + 1))
        counter.add(range(start, end), rows[start:end])
        start = end
    traffic = counter.total()
    assert np.array_equal(traffic.sent, sent)
    assert np.array_equal(traffic.received, received)
    assert np.array_equal(traffic.sent.sum(axis=0), traffic.received.sum(axis=0))


@given(layouts())
def test_one_row_to_every_peer(layout):
    counter = TrafficCounter(layout)
    for first in range(0, layout.num_gpus, layout.ep_size):
        counter.add(range(first, first + layout.ep_size), 1 - np.eye(layout.ep_size, dtype=np.int64))
    expected, traffic = counter.total(), Traffic.to_every_peer(layout)
    assert np.array_equal(traffic.sent, expected.sent)
    assert np.array_equal(traffic.received, expected.received)
