"""Compares whole simulations with results that are computed by hand or by loops."""

from dataclasses import astuple, replace

import numpy as np
import pytest
from support.small_cases import VOCAB_SIZE, count, make_mask, write_data

from maskmoe.analysis.dispatch_cost import Cluster, Cost, Layout, Link, MicroBatches, Simulation, Workload, simulate
from maskmoe.analysis.dispatch_cost.variants import VARIANTS, Masks, Routing
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.errors import UserError
from maskmoe.routing_mask import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.assignment import HashLayers
from maskmoe.transformer.dispatch.kind import DispatchKind

CLUSTER = Cluster(within=Link(bandwidth=400e9, latency=1e-6), across=Link(bandwidth=50e9, latency=3e-6))
HIDDEN, TOKENS = 64, 50
NAMES = [variant.name for variant in VARIANTS]


@pytest.fixture(scope="module")
def frequency(tmp_path_factory):
    return count(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return open_tokens(write_data(tmp_path_factory.mktemp("data")))


def run(frequency, tokens, mask, layouts, topks=(2,), layers=(0,), seed=0, hidden_size=HIDDEN):
    workload = Workload(topks, TOKENS, hidden_size, 2, mask.num_experts, mask.num_layers)
    simulation = Simulation(Masks(mask, layers, frequency), MicroBatches(tokens, TOKENS), CLUSTER, workload, seed)
    return simulation.run(layouts)


def by_name(results) -> dict[str, Cost]:
    return {result.variant.name: result.cost for result in results}


def test_costs_of_a_mask_without_choice(frequency, tokens):
    """At most k experts are visible, so that loops can follow every token."""
    mask = make_mask(frequency, num_experts=16, frequent_visible=3)
    layout = Layout(num_gpus=8, ep_size=4, gpus_per_node=2)
    costs = by_name(run(frequency, tokens, mask, [layout], topks=(3,)))
    visible = mask.visible_sets(0)
    for name, per_rank in (("mask, row per expert", False), ("mask, one copy", True)):
        weights = 4 * 4 if per_rank else 4  # weights of 4 local experts, or of 1 expert, in fp32
        counts = 8 * (1 + 4) if per_rank else 8 * 16
        sent = np.zeros(3)  # bytes by reach
        received, load = np.zeros((2, 8))
        for source in range(8):
            for rank in range(source // 4 * 4, source // 4 * 4 + 4):
                reach = 0 if rank == source else 1 if rank // 2 == source // 2 else 2
                rows = 0
                for token in tokens[source * 375 : source * 375 + TOKENS]:
                    num_selected = visible[token, rank % 4 * 4 :][:4].sum()
                    rows += min(num_selected, 1) if per_rank else num_selected
                    load[rank] += num_selected
                received[rank] += rows
                sent[reach] += rows * (4 * HIDDEN * 2 + 2 * weights) + (counts if reach else 0)
        cost = costs[name]
        assert (cost.bytes_own, cost.bytes_node, cost.bytes_across) == pytest.approx(tuple(sent / 8))
        assert (cost.rows, cost.max_rows) == (received.mean(), received.max())
        assert (cost.load, cost.max_load) == (load.mean(), load.max())
        assert cost.imbalance == load.max() / load.mean()


def test_rank_local_masks_are_planned(frequency, tokens):
    mask = make_mask(frequency, num_experts=32, frequent_visible=4, num_layers=2)
    layout = Layout(num_gpus=8, ep_size=8, gpus_per_node=4)
    results = run(frequency, tokens, mask, [layout], layers=(0, 1))
    dispatches = {result.variant.name: result.dispatch for result in results}
    assert dispatches["rank-local mask, planned"] is DispatchKind.PLANNED
    assert [dispatches[name] for name in NAMES[:4]] == [DispatchKind.STOCK, DispatchKind.ONE_COPY] * 2
    cost = by_name(results)["rank-local mask, planned"]
    assert cost.rows == TOKENS
    # Four all-to-alls of all tokens, and the token ids to seven other ranks, once for both layers.
    assert cost.bytes_own + cost.bytes_node + cost.bytes_across == pytest.approx(
        4 * TOKENS * HIDDEN * 2 + 7 * TOKENS * 4 / 2
    )
    assert cost.all_to_all_seconds < cost.seconds / 4


def test_a_given_mask_of_single_experts_is_planned(frequency, tokens):
    mask = make_mask(frequency, num_experts=8, frequent_visible=2)
    single = replace(mask, row_of_id=np.minimum(mask.row_of_id, mask.num_experts - 1))
    results = run(frequency, tokens, single, [Layout(8, 8, 8)])
    assert {result.variant.name: result.dispatch for result in results}["mask, one copy"] is DispatchKind.PLANNED
    assert all(result.impossible is None for result in results)


def test_local_masks(frequency):
    mask = make_mask(frequency, num_experts=32, frequent_visible=8)
    masks, layout = Masks(mask, [0], frequency), Layout(16, 16, 4)
    for routing, num_places, num_visible in ((Routing.RANK_LOCAL, 16, 2), (Routing.NODE_LOCAL, 4, 8)):
        (local,) = masks.layers_of(routing, layout)
        assert local.rank_of_rows(num_places) is not None
        assert local.max_visible == num_visible
        # The same ids see several experts.
        assert np.array_equal(local.num_visible_of_layer(0) > 1, mask.num_visible_of_layer(0) > 1)


def test_local_masks_copy_the_properties_of_each_layer(frequency):
    recipe = MaskRecipe(32, 3, "balanced", 0.4, 8, hash_layers=HashLayers(1, 2, "balanced"))
    mask = build_routing_mask(recipe, frequency=frequency)
    local = Masks(mask, [0, 1, 2], frequency).layers_of(Routing.NODE_LOCAL, Layout(16, 16, 4))
    assert [layer.max_visible for layer in local] == [2, 8, 8]
    assert [layer.min_visible for layer in local] == [2 if (frequency.occurrences > 0).all() else 1, 1, 1]
    assert not np.array_equal(local[1].visible_sets(0), local[2].visible_sets(0))


def test_tokens_of_a_node_local_mask_go_to_one_node(frequency, tokens):
    """A token crosses nodes at most once for each rank of a node, and about half of the tokens stay on their node."""
    mask = make_mask(frequency, num_experts=16, frequent_visible=8)
    layout = Layout(num_gpus=8, ep_size=8, gpus_per_node=4)
    costs = by_name(run(frequency, tokens, mask, [layout], topks=(8,), hidden_size=1 << 20))
    (local,) = Masks(mask, [0], frequency).layers_of(Routing.NODE_LOCAL, layout)
    node_of_id = local.rank_of_rows(2)[0][local.row_of_id[0]]
    visible = local.visible_sets(0).reshape(VOCAB_SIZE, 8, 2).any(axis=2)  # [vocab, ranks]
    across = sum(
        visible[token].sum()
        for source in range(8)
        for token in tokens[source * 375 : source * 375 + TOKENS]
        if node_of_id[token] != source // 4
    )
    cost = costs["node-local mask, one copy"]
    assert cost.bytes_across == pytest.approx(across / 8 * 4 * (1 << 20) * 2, rel=1e-3)


def test_variants(frequency, tokens):
    mask = make_mask(frequency, num_experts=32, frequent_visible=4)
    costs = by_name(run(frequency, tokens, mask, [Layout(8, 8, 4)], topks=(4,)))
    for stock, one_copy in ((0, 1), (2, 3)):
        stock, one_copy = costs[NAMES[stock]], costs[NAMES[one_copy]]
        assert one_copy.rows <= stock.rows == stock.load == one_copy.load
        assert one_copy.max_load == stock.max_load
    assert costs["top-k, one copy"].rows < 4 * TOKENS
    assert costs["top-k, row per expert"].rows == 4 * TOKENS
    assert costs["top-k, row per expert"].expected_imbalance == pytest.approx(1)


def test_layers_are_averaged(frequency, tokens):
    mask = make_mask(frequency, num_experts=16, frequent_visible=3, num_layers=3)
    layouts = [Layout(8, 8, 4)]
    both = by_name(run(frequency, tokens, mask, layouts, topks=(3,), layers=(0, 2)))["mask, one copy"]
    single = [
        by_name(run(frequency, tokens, mask, layouts, topks=(3,), layers=(layer,)))["mask, one copy"]
        for layer in (0, 2)
    ]
    assert astuple(both) == pytest.approx(astuple(Cost.mean(single)))
    assert single[0] != single[1]


def test_results_do_not_depend_on_what_else_is_simulated(frequency, tokens):
    mask = make_mask(frequency, num_experts=32, frequent_visible=8)
    layouts = [Layout(8, 8, 4), Layout(16, 8, 4)]
    together = run(frequency, tokens, mask, layouts, topks=(2, 4))
    apart = [
        result for topk in (2, 4) for layout in layouts for result in run(frequency, tokens, mask, [layout], (topk,))
    ]
    assert together == apart
    assert together != run(frequency, tokens, mask, layouts, topks=(2, 4), seed=1)


def test_blocks_cover_all_ranks_of_one_group_at_a_time():
    layout = Layout(num_gpus=24, ep_size=12, gpus_per_node=8)
    blocks = list(simulate._blocks(layout, simulate._BLOCK_TOKENS // 5))
    assert [rank for block in blocks for rank in block] == list(range(24))
    assert max(map(len, blocks)) == 5
    assert all(block[0] // 12 == block[-1] // 12 for block in blocks)


@pytest.mark.parametrize(
    ("sizes", "impossible"),
    [
        ((64, 64, 8), dict.fromkeys(NAMES, "32 experts are fewer than 64 expert-parallel ranks")),
        ((48, 12, 8), dict.fromkeys(NAMES, "32 experts cannot be divided evenly over 12 expert-parallel ranks")),
        ((24, 16, 8), dict.fromkeys(NAMES, "24 GPUs cannot be divided into groups of 16 expert-parallel ranks")),
        ((16, 16, 8), {NAMES[4]: "a rank has 2 of the experts, fewer than the 4 that a frequent id needs"}),
        ((32, 32, 2), {NAMES[4]: "a rank has 1 of", NAMES[5]: "a node has 2 of the experts, fewer than the 4"}),
        ((24, 4, 3), {NAMES[5]: "4 expert-parallel ranks do not fill whole nodes of 3"}),
    ],
)
def test_impossible_variants_say_why(frequency, tokens, sizes, impossible):
    mask = make_mask(frequency, num_experts=32, frequent_visible=6)
    results = run(frequency, tokens, mask, [Layout(*sizes)], topks=(4,))
    assert [result.variant.name for result in results] == NAMES
    for result in results:
        if result.variant.name in impossible:
            assert impossible[result.variant.name] in result.impossible
            assert result.cost is None
        else:
            assert result.impossible is None
            assert result.cost.seconds > 0


def test_micro_batches():
    token_ids = np.arange(100)
    batches = MicroBatches(token_ids, 30)
    assert batches.of_ranks(range(2), 2).tolist() == [list(range(30)), list(range(50, 80))]
    assert batches.of_ranks(range(3, 4), 4).tolist() == [[*range(75, 100), *range(5)]]
    assert not batches.overlap(3)
    assert batches.overlap(4)
    with pytest.raises(UserError, match="100 tokens, fewer than the 101"):
        MicroBatches(token_ids, 101)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (((0,), 1, 1, 1, 8, 1), "top-k must be 1 to 8"),
        (((2, 9), 1, 1, 1, 8, 1), "not 9"),
        (((1,), 0, 1, 1, 8, 1), "tokens per rank must be at least 1"),
        (((1,), 1, 0, 1, 8, 1), "hidden size"),
        (((1,), 1, 1, -2, 8, 1), "bytes per element"),
    ],
)
def test_impossible_workloads_are_rejected(sizes, words):
    with pytest.raises(UserError, match=words):
        Workload(*sizes)
