"""Compares simulated bytes with the bytes that real ranks put into their collectives, for each pair of ranks."""

import json

import numpy as np
import pytest
from support.launchers import RANK_SCRIPTS
from support.small_cases import count, make_cluster, make_mask, write_data

from maskmoe.analysis.dispatch_simulation import Routing, Simulation, mask_of_layer
from maskmoe.analysis.dispatch_traffic import NO_EXPERT, VisibleLists, Workload, exchanges, rows_to_ranks
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


def routing_map(experts: np.ndarray, num_experts: int) -> np.ndarray:
    """Return the selected experts, bool [tokens, experts], of experts [k, tokens]."""
    selected = np.zeros((experts.shape[1], num_experts + 1), bool)
    selected[np.arange(len(selected)), experts] = True  # `NO_EXPERT` falls into the last column
    assert NO_EXPERT == -1
    return selected[:, :-1]


@pytest.mark.parametrize("num_ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (4, 8))])
def test_bytes_are_those_of_real_ranks(run_ranks, tmp_path, num_ranks):
    num_experts, cluster = 4 * num_ranks, make_cluster(num_ranks, num_ranks, num_ranks // 2)
    prefix = write_data(tmp_path)
    frequency = count(prefix)
    # With at most k visible experts there is nothing to choose, so the simulation selects the same experts.
    mask = make_mask(frequency, num_experts, frequent_visible=TOPK)
    workload = Workload(TOKENS, HIDDEN, 4, num_experts, num_layers=1)
    simulation = Simulation(mask, 0, frequency, open_tokens(prefix), workload)
    token_ids = np.stack([simulation.tokens_of_rank(rank, num_ranks) for rank in range(num_ranks)]).astype(np.int64)
    rng, maps, rows = np.random.default_rng(0), {}, {}
    for routing in (Routing.TOPK, Routing.MASK, Routing.RANK_LOCAL):
        layer_mask = mask_of_layer(routing, mask, 0, frequency, num_ranks)
        experts = [VisibleLists(layer_mask).draw(ids, TOPK, rng) for ids in token_ids]  # for each rank [k, tokens]
        maps[routing.value] = np.stack([routing_map(of_rank, num_experts) for of_rank in experts])
        of_ranks = [rows_to_ranks(of_rank, num_ranks, num_experts // num_ranks) for of_rank in experts]
        per_expert, per_rank = np.stack(of_ranks, axis=1)  # [ranks, ranks] each
        rows |= {f"{routing.value}, row per expert": per_expert, f"{routing.value}, one copy": per_rank}
    rows["rank-local mask, planned"] = rows["rank-local mask, one copy"]
    layer_mask.save(tmp_path / "rank_local.safetensors")
    np.savez(tmp_path / "cases.npz", token_ids=token_ids, topk=TOPK, hidden_size=HIDDEN, **maps)

    run_ranks(PROGRAM, tmp_path, world_size=num_ranks)

    calls_of_ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    costs = {cost.variant: cost for cost in simulation.run([cluster], [TOPK])}
    for name, dispatch in DISPATCH.items():
        matrix = rows[name]  # [ranks, ranks]
        expected = {exchange.content: exchange for exchange in exchanges(dispatch, matrix, workload, cluster)}
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
            on_node = sent[ranks[:, None] // cluster.gpus_per_node == ranks // cluster.gpus_per_node].sum() - own
            cost = costs[name]
            assert cost.bytes_own * num_ranks == own
            assert cost.bytes_node * num_ranks == on_node
            assert cost.bytes_across * num_ranks == sent.sum() - own - on_node
