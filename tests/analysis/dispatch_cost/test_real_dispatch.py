"""Compares simulated bytes with the bytes that real ranks put into their collectives, for each pair of ranks."""

import json

import numpy as np
import pytest
from support.launchers import RANK_SCRIPTS
from support.small_cases import count, make_mask, write_data

from maskmoe.analysis.dispatch_cost import Cluster, Layout, Link, MicroBatches, Simulation, Workload
from maskmoe.analysis.dispatch_cost.dispatch import Traffic, exchanges, rows_of_choices
from maskmoe.analysis.dispatch_cost.routing import VisibleTable
from maskmoe.analysis.dispatch_cost.variants import Masks, Routing
from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.transformer.dispatch.kind import DispatchKind

PROGRAM = RANK_SCRIPTS / "dispatch_ranks.py"
TOPK, HIDDEN, TOKENS = 3, 24, 200
DISPATCH = {
    "top-k, row per expert": DispatchKind.STOCK,
    "top-k, one copy": DispatchKind.ONE_COPY,
    "mask, row per expert": DispatchKind.STOCK,
    "mask, one copy": DispatchKind.ONE_COPY,
    "rank-local mask, planned": DispatchKind.PLANNED,
}


def routing_map(choices, num_tokens: int, num_experts: int) -> np.ndarray:
    """Return the selected experts, bool [tokens, experts]."""
    selected = np.zeros((num_tokens, num_experts), bool)
    for choice in choices:
        selected[choice.tokens, choice.experts] = True
    return selected


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_bytes_are_those_of_real_ranks(run_ranks, tmp_path, num_ranks):
    num_experts, layout = 4 * num_ranks, Layout(num_ranks, num_ranks, num_ranks // 2)
    prefix = write_data(tmp_path)
    frequency = count(prefix)
    # With at most k visible experts there is nothing to choose, so the simulation selects the same experts.
    mask = make_mask(frequency, num_experts, frequent_visible=TOPK)
    batches = MicroBatches(open_tokens(prefix), TOKENS)
    token_ids = batches.of_ranks(range(num_ranks), num_ranks).astype(np.int64)  # [ranks, tokens]
    masks = Masks(mask, [0], frequency)
    rng, maps, rows = np.random.default_rng(0), {}, {}
    for name, routing in (("top-k", Routing.TOPK), ("mask", Routing.MASK), ("rank-local mask", Routing.RANK_LOCAL)):
        (layer_mask,) = masks.layers_of(routing, layout)
        choices = list(VisibleTable.of_layer(layer_mask, 0).choose(token_ids.ravel(), TOPK, rng))
        maps[name] = routing_map(choices, token_ids.size, num_experts).reshape(num_ranks, TOKENS, num_experts)
        per_expert, per_rank = rows_of_choices(choices, (num_ranks, TOKENS), num_ranks, num_experts // num_ranks)
        rows |= {f"{name}, row per expert": per_expert, f"{name}, one copy": per_rank}
    rows["rank-local mask, planned"] = rows["rank-local mask, one copy"]
    layer_mask.save(tmp_path / "rank_local.safetensors")
    np.savez(tmp_path / "cases.npz", token_ids=token_ids, topk=TOPK, hidden_size=HIDDEN, **maps)

    run_ranks(PROGRAM, tmp_path, world_size=num_ranks)

    calls_of_ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    workload = Workload((TOPK,), TOKENS, HIDDEN, 4, num_experts, num_layers=1)
    link = Link(1e9, 0)
    results = Simulation(masks, batches, Cluster(link, link), workload).run([layout])
    costs = {result.variant.name: result.cost for result in results}
    for name, dispatch in DISPATCH.items():
        matrix = rows[name]  # [ranks, ranks]
        traffic = Traffic.empty(layout)
        traffic.add(range(num_ranks), matrix)
        expected = {exchange.content: exchange for exchange in exchanges(dispatch, traffic, workload)}
        assert {call[0] for rank_calls in calls_of_ranks for call in rank_calls[name]} == expected.keys()
        sent = np.zeros((num_ranks, num_ranks))
        for content, exchange in expected.items():
            sizes_of_ranks = [
                [sizes for call_content, sizes in rank_calls[name] if call_content == content]
                for rank_calls in calls_of_ranks
            ]
            calls = np.array(sizes_of_ranks).swapaxes(0, 1)  # [calls, ranks, ranks]
            assert len(calls) == exchange.calls
            if content in ("counts", "token ids"):
                others = ~np.eye(num_ranks, dtype=bool)
                assert (calls[:, others] == exchange.bytes_per_row).all()
                calls = calls * others
            else:
                # Calls alternate between the directions of dispatch and combine; gradients repeat both.
                assert (calls[0::2] == matrix * exchange.bytes_per_row).all()
                assert (calls[1::2] == matrix.T * exchange.bytes_per_row).all()
            sent += calls.sum(axis=0)
        if not name.startswith("top-k"):
            ranks = np.arange(num_ranks)
            own = np.trace(sent)
            on_node = sent[ranks[:, None] // layout.gpus_per_node == ranks // layout.gpus_per_node].sum() - own
            cost = costs[name]
            assert cost.bytes_own * num_ranks == own
            assert cost.bytes_node * num_ranks == on_node
            assert cost.bytes_across * num_ranks == sent.sum() - own - on_node
