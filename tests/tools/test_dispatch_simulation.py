"""Compares whole simulations with results that are computed by hand or by loops."""

import csv
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from dispatch_simulation import DispatchCost, Routing, Simulation, mask_of_layer
from dispatch_traffic import Workload
from support.paths import ROOT
from support.small_cases import VOCAB_SIZE, count, make_cluster, make_mask, write_data

from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.errors import UserError

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


def test_command_line(tmp_path):
    mask = make_mask(count(write_data(tmp_path)), num_experts=32, frequent_visible=4, num_layers=2)
    mask.save(tmp_path / "mask.safetensors")
    flags = "--data-path text --routing-mask mask.safetensors --hidden-size 64 --tokens-per-rank 50 --gpus-per-node 4"
    words = (sys.executable, ROOT / "tools" / "studies" / "simulate_dispatch.py", *flags.split())
    run = partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True, check=False)
    outputs = ("--output", "costs.csv", "--plot", "plot.png")
    done = run([*words, "--topk", "2", "4", "--num-gpus", "64", "8", *outputs])
    assert done.returncode == 0, done.stderr
    assert "impossible: 32 experts cannot be divided evenly over 64 expert-parallel ranks" in done.stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "costs.csv", newline="", encoding="utf-8") as stream:
        rows = [*csv.DictReader(stream)]
    assert [(row["topk"], row["num_gpus"]) for row in rows] == [
        (k, n) for k in "24" for n in ("8", "64") for _ in NAMES
    ]
    assert all((row["impossible"] == "") != (row["seconds"] == "") for row in rows)
    assert run([*words, "--topk", "33"]).returncode == 2
