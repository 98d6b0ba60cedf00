"""Computes reaches and times by hand and rejects impossible clusters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.small_cases import make_cluster

from maskmoe.analysis.cluster import Reach
from maskmoe.errors import UserError


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


def test_time_of_one_message():
    cluster = make_cluster(4, 4, 2)
    rows = np.zeros((4, 4), int)
    rows[0] = 9, 0, 10, 0
    # Two peers are on the other node. Rank 0 sends to them and determines the time.
    assert cluster.seconds(rows, 1000) == pytest.approx(2 * 3e-6 + 10 * 1000 / 50e9)


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


@pytest.mark.parametrize(("sizes", "words"), [((12, 12, 8), "12 GPUs"), ((8, 1, 8), "at least 2 ranks")])
def test_impossible_clusters_are_rejected(sizes, words):
    with pytest.raises(UserError, match=words):
        make_cluster(*sizes)
