"""Compares whole simulations with results that are computed by hand or by loops."""

from dataclasses import replace

import numpy as np
import pytest
from support.small_cases import VOCAB_SIZE, count, make_cluster, make_mask, write_data

from maskmoe.analysis.dispatch_simulation import DispatchCost, Routing, Simulation, mask_of_layer
from maskmoe.analysis.dispatch_traffic import Workload
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.mask import HashLayers

HIDDEN, TOKENS = 64, 50
NAMES = [
    *("top-k, row per expert", "top-k, one copy", "mask, row per expert", "mask, one copy"),
    *("rank-local mask, planned", "node-local mask, one copy"),
]


@pytest.fixture(scope="module")
def frequency(tmp_path_factory):
    return count(write_data(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return open_tokens(write_data(tmp_path_factory.mktemp("data")))


def run(frequency, tokens, mask, clusters, topks=(2,), seed=0, hidden_size=HIDDEN, layer=0):
    workload = Workload(TOKENS, hidden_size, 2, mask.num_experts, mask.num_layers)
    return Simulation(mask, layer, frequency, tokens, workload, seed).run(clusters, topks)


def by_name(costs) -> dict[str, DispatchCost]:
    return {cost.variant: cost for cost in costs}


def test_rank_local_masks_are_planned(frequency, tokens):
    mask = make_mask(frequency, num_experts=32, frequent_visible=4, num_layers=2)
    costs = run(frequency, tokens, mask, [make_cluster(8, 8, 4)])
    assert [cost.variant for cost in costs] == NAMES
    cost = by_name(costs)["rank-local mask, planned"]
    assert cost.rows == TOKENS
    # Four all-to-alls of all tokens, and the token ids to seven other ranks, once for both layers.
    assert cost.bytes_own + cost.bytes_node + cost.bytes_across == pytest.approx(
        4 * TOKENS * HIDDEN * 2 + 7 * TOKENS * 4 / 2
    )
    assert cost.all_to_all_seconds < cost.seconds / 4


def test_a_given_mask_of_single_experts_is_planned(frequency, tokens):
    mask = make_mask(frequency, num_experts=8, frequent_visible=2)
    single = replace(mask, row_of_id=np.minimum(mask.row_of_id, mask.num_experts - 1))
    costs = run(frequency, tokens, single, [make_cluster(8, 8, 8)])
    assert "mask, planned" in by_name(costs)
    assert not any(cost.impossible for cost in costs)


def test_local_masks_copy_the_properties_of_each_layer(frequency):
    recipe = MaskRecipe(32, 3, "balanced", 0.4, 8, hash_layers=HashLayers(1, 2, "balanced"))
    mask = build_routing_mask(recipe, frequency=frequency)
    for routing, num_places, visible in ((Routing.RANK_LOCAL, 16, (2, 2, 2)), (Routing.NODE_LOCAL, 4, (2, 8, 8))):
        local = [mask_of_layer(routing, mask, layer, frequency, num_places, topk=2) for layer in range(3)]
        assert [layer.max_visible for layer in local] == list(visible)
        assert all(layer.rank_of_rows(num_places) is not None for layer in local)
        assert not np.array_equal(local[1].visible_sets(0), local[2].visible_sets(0))
        # The same ids see several experts; ids that never occur are frequent only in a mask with an own set for each.
        seen = frequency.occurrences > 0
        for layer in range(3):
            several = [each.num_visible_of_layer(number) > 1 for each, number in ((mask, layer), (local[layer], 0))]
            assert np.array_equal(several[0][seen], several[1][seen])


def test_tokens_of_a_node_local_mask_go_to_one_node(frequency, tokens):
    """A token crosses nodes at most once for each rank of a node, and about half of the tokens stay on their node."""
    mask = make_mask(frequency, num_experts=16, frequent_visible=8)
    costs = by_name(run(frequency, tokens, mask, [make_cluster(8, 8, 4)], topks=(8,), hidden_size=1 << 20))
    local = mask_of_layer(Routing.NODE_LOCAL, mask, 0, frequency, 2, topk=8)
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


def test_a_layer_is_simulated(frequency, tokens):
    mask = make_mask(frequency, num_experts=16, frequent_visible=3, num_layers=2)
    clusters = [make_cluster(8, 8, 4)]
    first, second = (run(frequency, tokens, mask, clusters, topks=(3,), layer=layer) for layer in range(2))
    alone = run(frequency, tokens, mask_of_layer(Routing.MASK, mask, 1, frequency, 1, topk=3), clusters, topks=(3,))
    # All visible experts are selected, so the random stream decides nothing.
    assert by_name(second)["mask, one copy"] == by_name(alone)["mask, one copy"]
    assert by_name(second)["mask, one copy"] != by_name(first)["mask, one copy"]


def test_a_mask_is_planned_only_if_all_layers_allow_it(frequency, tokens):
    recipe = MaskRecipe(16, 2, "balanced", 0.4, 4, hash_layers=HashLayers(1, 1, "balanced"))
    mask = build_routing_mask(recipe, frequency=frequency)
    assert "mask, one copy" in by_name(run(frequency, tokens, mask, [make_cluster(8, 8, 4)]))


def test_results_do_not_depend_on_what_else_is_simulated(frequency, tokens):
    mask = make_mask(frequency, num_experts=32, frequent_visible=8)
    clusters = [make_cluster(8, 8, 4), make_cluster(16, 8, 4)]
    together = run(frequency, tokens, mask, clusters, topks=(2, 4))
    apart = [cost for topk in (2, 4) for each in clusters for cost in run(frequency, tokens, mask, [each], (topk,))]
    assert together == apart
    assert together != run(frequency, tokens, mask, clusters, topks=(2, 4), seed=1)


@pytest.mark.parametrize(
    ("sizes", "impossible"),
    [
        ((64, 64, 8), dict.fromkeys(NAMES, "32 experts cannot be divided evenly over 64 expert-parallel ranks")),
        ((48, 12, 8), dict.fromkeys(NAMES, "32 experts cannot be divided evenly over 12 expert-parallel ranks")),
        ((24, 16, 8), dict.fromkeys(NAMES, "24 GPUs cannot be divided into groups of 16 expert-parallel ranks")),
        ((16, 16, 8), {NAMES[4]: "a rank has 2 of the experts, fewer than the 4 that a frequent id needs"}),
        ((32, 32, 2), {NAMES[4]: "a rank has 1 of", NAMES[5]: "a node has 2 of the experts, fewer than the 4"}),
        ((24, 4, 3), {NAMES[5]: "4 expert-parallel ranks do not fill whole nodes of 3"}),
    ],
)
def test_impossible_variants_say_why(frequency, tokens, sizes, impossible):
    mask = make_mask(frequency, num_experts=32, frequent_visible=6)
    costs = run(frequency, tokens, mask, [make_cluster(*sizes)], topks=(4,))
    assert [cost.variant for cost in costs] == NAMES
    for cost in costs:
        if cost.variant in impossible:
            assert impossible[cost.variant] in cost.impossible
        else:
            assert cost.impossible == ""
            assert cost.seconds > 0


def test_tokens_of_ranks():
    simulation = Simulation(None, 0, None, np.arange(100), Workload(30, 1, 1, 4, 1))
    assert simulation.tokens_of_rank(0, 2).tolist() == list(range(30))
    assert simulation.tokens_of_rank(1, 2).tolist() == list(range(50, 80))
    assert simulation.tokens_of_rank(3, 4).tolist() == [*range(75, 100), *range(5)]
    with pytest.raises(UserError, match="100 tokens, fewer than the 101"):
        replace(simulation, workload=Workload(101, 1, 1, 4, 1))
