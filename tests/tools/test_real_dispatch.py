"""Compares simulated bytes with the bytes that real ranks put into their collectives, for each pair of ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import mappings
from support.paths import ROOT
from support.small_moe import initialize_parallelism, make_config, make_layer, plan_ids
from torch import Tensor

from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

sys.path.append(str(ROOT / "tools" / "studies"))  # also for ranks
from dispatch_simulation import Routing, Simulation, mask_of_layer
from dispatch_traffic import Sending, VisibleLists, Workload, exchanges, rows_to_ranks
from support.small_cases import count, make_cluster, make_mask, write_data

TOPK, HIDDEN, TOKENS = 3, 24, 200
DISPATCH = {
    "mask, row per expert": DispatchKind.STOCK,
    "mask, one copy": DispatchKind.ONE_COPY,
    "rank-local mask, planned": DispatchKind.PLANNED,
}


def record_collectives(num_ranks: int) -> list[tuple[str, list[int]]]:
    """Let torch's collectives record what they carry and the bytes sent to each rank; return the growing list."""
    calls: list[tuple[str, list[int]]] = []
    all_to_all, all_gather = torch.distributed.all_to_all_single, torch.distributed.all_gather_into_tensor

    def recorded_all_to_all(output: Tensor, input: Tensor, output_split_sizes=None, input_split_sizes=None, **kwargs):
        splits = [len(input) // num_ranks] * num_ranks if input_split_sizes is None else input_split_sizes
        bytes_per_row = input.element_size() * input.shape[1:].numel()
        what = "hidden states" if input.shape[1:] == (HIDDEN,) else "weights"
        calls.append((what if input.is_floating_point() else "counts", [int(rows) * bytes_per_row for rows in splits]))
        return all_to_all(output, input, output_split_sizes, input_split_sizes, **kwargs)

    def recorded_all_gather(output: Tensor, input: Tensor, **kwargs):
        calls.append(("counts", [input.nbytes] * num_ranks))
        return all_gather(output, input, **kwargs)

    torch.distributed.all_to_all_single = recorded_all_to_all
    torch.distributed.all_gather_into_tensor = mappings.dist_all_gather_func = recorded_all_gather
    return calls


def calls_of_rank(folder: Path) -> dict[str, list[tuple[str, list[int]]]]:
    """Run a layer on the ids in FOLDER/ids.npy; return the bytes that each collective sent to each rank."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = initialize_parallelism(expert_model_parallel_size=num_ranks)
    config = make_config(4 * num_ranks, TOPK, hidden_size=HIDDEN, expert_model_parallel_size=num_ranks)
    token_ids = TokenIds(torch.from_numpy(np.load(folder / "ids.npy")[rank]).unsqueeze(0))
    recorded, calls = record_collectives(num_ranks), {}
    for name, kind in DISPATCH.items():
        layer = make_layer(config, RoutingMask.load(folder / f"{name.partition(', ')[0]}.safetensors"))
        layer.dispatcher = build_dispatcher(kind, layer, groups)
        hidden = torch.ones(token_ids.ids.shape[1], 1, HIDDEN, requires_grad=True)
        recorded.clear()
        ids = plan_ids(layer, token_ids) if kind is DispatchKind.PLANNED else token_ids
        output, _ = layer(hidden, padding_mask=pack_token_ids(ids))
        output.sum().backward()
        calls[name] = [*recorded]
    return calls


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
    np.save(tmp_path / "ids.npy", token_ids)
    rng, rows = np.random.default_rng(0), {}
    for routing in (Routing.MASK, Routing.RANK_LOCAL):
        layer_mask = mask_of_layer(routing, mask, 0, frequency, num_ranks, TOPK)
        layer_mask.save(tmp_path / f"{routing.value}.safetensors")
        experts = [VisibleLists(layer_mask).draw(ids, TOPK, rng) for ids in token_ids]  # for each rank [k, tokens]
        of_ranks = [rows_to_ranks(of_rank, num_ranks, num_experts // num_ranks) for of_rank in experts]
        per_expert, per_rank = np.stack(of_ranks, axis=1)  # [ranks, ranks] each
        rows |= {f"{routing.value}, row per expert": per_expert, f"{routing.value}, one copy": per_rank}
    rows["rank-local mask, planned"] = rows["rank-local mask, one copy"]

    calls_of_ranks = run_ranks(calls_of_rank, tmp_path, tmp_path, world_size=num_ranks)
    costs = {cost.variant: cost for cost in simulation.run([cluster], [TOPK])}
    for name, dispatch in DISPATCH.items():
        matrix = rows[name]  # [ranks, ranks]
        collectives = exchanges(Sending[dispatch.name], matrix, workload, cluster, TOPK)
        expected = {exchange.content: exchange for exchange in collectives}
        assert {call[0] for rank_calls in calls_of_ranks for call in rank_calls[name]} == expected.keys()
        sent = np.zeros((num_ranks, num_ranks))
        for content, exchange in expected.items():
            sizes_of_ranks = [
                [sizes for call_content, sizes in rank_calls[name] if call_content == content]
                for rank_calls in calls_of_ranks
            ]
            calls = np.array(sizes_of_ranks).swapaxes(0, 1)  # [calls, ranks, ranks]
            assert len(calls) == exchange.calls
            if content == "counts":
                others = ~np.eye(num_ranks, dtype=bool)
                assert (calls[:, others] == exchange.bytes_per_row).all()
                calls = calls * others
            else:
                # Calls alternate between the directions of dispatch and combine; gradients repeat both.
                assert (calls[0::2] == matrix * exchange.bytes_per_row).all()
                assert (calls[1::2] == matrix.T * exchange.bytes_per_row).all()
            sent += calls.sum(axis=0)
        ranks = np.arange(num_ranks)
        own = np.trace(sent)
        on_node = sent[ranks[:, None] // cluster.gpus_per_node == ranks // cluster.gpus_per_node].sum() - own
        cost = costs[name]
        load = rows[f"{name.partition(', ')[0]}, row per expert"].sum(axis=0)
        assert cost.load_max_over_mean == pytest.approx(load.max() / load.mean())
        assert cost.rows == matrix.sum() / num_ranks
        assert cost.bytes_own * num_ranks == own
        assert cost.bytes_node * num_ranks == on_node
        assert cost.bytes_across * num_ranks == sent.sum() - own - on_node
