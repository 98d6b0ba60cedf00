"""Computes times by hand and rejects impossible clusters."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.analysis.dispatch_cost import Cluster, Layout, Link
from maskmoe.analysis.dispatch_cost.cluster import Reach
from maskmoe.analysis.dispatch_cost.dispatch import Exchange, Traffic
from maskmoe.errors import UserError

CLUSTER = Cluster(within=Link(bandwidth=400e9, latency=1e-6), across=Link(bandwidth=50e9, latency=3e-6))


def test_time_of_one_message():
    traffic = Traffic.empty(Layout(num_gpus=4, ep_size=4, gpus_per_node=2))
    traffic.add(range(1), np.array([[9, 0, 10, 0]]))
    # Two peers are on the other node. Rank 0 sends to them and determines the time.
    assert Exchange("rows", 1, traffic, 1000).seconds(CLUSTER) == pytest.approx(2 * 3e-6 + 10 * 1000 / 50e9)


@given(st.integers(0, 2**32))
def test_the_busiest_direction_of_the_busiest_rank_decides(seed):
    layout = Layout(num_gpus=8, ep_size=4, gpus_per_node=2)
    rows = np.random.default_rng(seed).integers(0, 100, size=(8, 4))
    traffic, slowest = Traffic.empty(layout), 0.0
    for first in (0, 4):
        traffic.add(range(first, first + 4), matrix := rows[first : first + 4])
        for rank in range(4):
            neighbour = rank ^ 1
            others = [other for other in range(4) if other // 2 != rank // 2]
            rows_within = max(matrix[rank, neighbour], matrix[neighbour, rank])
            rows_across = max(matrix[rank, others].sum(), matrix[others, rank].sum())
            slowest = max(slowest, 1e-6 + rows_within * 4096 / 400e9, 2 * 3e-6 + rows_across * 4096 / 50e9)
    assert Exchange("rows", 1, traffic, 4096).seconds(CLUSTER) == pytest.approx(slowest)


@pytest.mark.parametrize(
    ("ep_size", "gpus_per_node", "nodes"), [(8, 4, 2), (4, 4, 1), (2, 4, 1), (6, 4, None), (3, 4, None), (5, 1, 5)]
)
def test_nodes_of_a_group(ep_size, gpus_per_node, nodes):
    layout = Layout(math.lcm(ep_size, gpus_per_node), ep_size, gpus_per_node)
    assert layout.nodes_per_group == nodes
    assert (layout.num_peers.sum(axis=1) == ep_size - 1).all()
    assert (layout.num_peers[:, Reach.OWN] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((12, 12, 8), "12 GPUs"), ((0, 2, 8), "0 GPUs"), ((8, 1, 8), "at least 2 ranks"), ((8, 8, 0), "a node")],
)
def test_impossible_layouts_are_rejected(sizes, words):
    with pytest.raises(UserError, match=words):
        Layout(*sizes)


@pytest.mark.parametrize(
    ("bandwidth", "latency", "words"),
    [
        (0, 1, "bandwidth .* not 0$"),
        (-1e9, 1, "bandwidth .* not -1$"),
        (math.nan, 1, "bandwidth"),
        (math.inf, 1, "bandwidth"),
        (1e9, -1e-6, "latency .* not -1$"),
        (1e9, math.nan, "latency"),
    ],
)
def test_impossible_links_are_rejected(bandwidth, latency, words):
    link, good = Link(bandwidth, latency), CLUSTER.within
    with pytest.raises(UserError, match=words.replace(" .*", " within a node .*")):
        Cluster(link, good)
    with pytest.raises(UserError, match=words.replace(" .*", " between nodes .*")):
        Cluster(good, link)
