"""Plans of several ranks, made in one process, against loops over tokens."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_moe import DEVICE, make_config, make_mask, make_visible_experts, random_visible_sets
from torch import Tensor

from maskmoe.transformer.dispatch.plan import DispatchPlanner
from maskmoe.transformer.token_ids import DispatchPlan, TokenIds

EXPERTS_OF_RANK, VOCAB_SIZE, BATCH, SEQUENCE, TOPK = 3, 9, 2, 5, 2
SIZES = ((1, 2, 3), (1, 2), (1,))
"""The sizes of the visible sets of each table: above k, at most k, and one expert."""


def rank_local_sets(num_ranks: int) -> np.ndarray:
    """Draw visible sets, bool [tables, vocab, N], each on one rank."""
    drawn = np.concatenate(
        [random_visible_sets(seed, 1, VOCAB_SIZE, EXPERTS_OF_RANK, sizes) for seed, sizes in enumerate(SIZES)]
    )
    rank = np.random.default_rng(2).integers(0, num_ranks, (len(SIZES), VOCAB_SIZE, 1, 1))
    sets = drawn[:, :, None] & (np.arange(num_ranks)[:, None] == rank)
    return sets.reshape(len(SIZES), VOCAB_SIZE, -1)


def plan_of_every_rank(
    num_ranks: int, visible_sets: np.ndarray, token_ids: list[TokenIds], monkeypatch: pytest.MonkeyPatch
) -> list[DispatchPlan]:
    """Plan for each rank in turn; the exchange of counts is replaced."""
    config = make_config(num_ranks * EXPERTS_OF_RANK, TOPK, num_layers=len(SIZES), expert_model_parallel_size=num_ranks)
    visible_experts = make_visible_experts(config, make_mask(visible_sets))
    assert visible_experts.is_rank_local
    sent: dict[int, Tensor] = {}

    def all_to_all(received: Tensor, own: Tensor, group: SimpleNamespace) -> None:
        sent[group.rank()] = own
        if len(sent) == num_ranks:
            received.copy_(torch.stack([sent[rank][group.rank()] for rank in range(num_ranks)]))

    monkeypatch.setattr(torch.distributed, "all_to_all_single", all_to_all)
    groups = [SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: num_ranks) for rank in range(num_ranks)]
    planners = [DispatchPlanner(visible_experts, TOPK, [2, 0, 1, 2], group) for group in groups]
    # The first round only collects what the ranks send.
    for _ in range(2):
        plans = [planner.plan(ids) for planner, ids in zip(planners, token_ids, strict=True)]
    return plans


def draw_ids(rank: int, has_padding: bool) -> TokenIds:
    rng = np.random.default_rng(10 + rank)
    ids = torch.from_numpy(rng.integers(0, VOCAB_SIZE, (BATCH, SEQUENCE))).to(DEVICE)
    return TokenIds(ids, torch.from_numpy(rng.random((BATCH, SEQUENCE)) < 0.4).to(DEVICE) if has_padding else None)


@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_plan_equals_a_loop_over_tokens(num_ranks: int, has_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    visible_sets = rank_local_sets(num_ranks)
    token_ids = [draw_ids(rank, has_padding) for rank in range(num_ranks)]
    plans = plan_of_every_rank(num_ranks, visible_sets, token_ids, monkeypatch)
    ids_of_ranks = [ids.ids.T.flatten().tolist() for ids in token_ids]
    for rank, plan in enumerate(plans):
        assert set(plan) == {0, 1, 2}
        for table, of_table in plan.items():
            is_single = SIZES[table] == (1,)

            def first_expert(token_id: int, table: int = table) -> int:
                return int(visible_sets[table, token_id].argmax())

            def order(ids: list[int], is_single: bool = is_single) -> list[int]:
                """Return positions in the order in which a rank sends its rows."""
                keys = [first_expert(i) if is_single else first_expert(i) // EXPERTS_OF_RANK for i in ids]
                return [position for _, position in sorted(zip(keys, range(len(ids)), strict=True))]

            own = ids_of_ranks[rank]
            destination = [first_expert(token_id) // EXPERTS_OF_RANK for token_id in own]
            rows = order(own)
            copied = of_table.to_ranks(torch.arange(float(len(own))).unsqueeze(1))
            assert copied.copies.flatten().tolist() == rows
            assert copied.values.tolist() == [row * num_ranks + destination[row] for row in rows]
            assert of_table.exchange.rows_to == tuple(destination.count(to) for to in range(num_ranks))

            received = [
                [ids[position] for position in order(ids) if first_expert(ids[position]) // EXPERTS_OF_RANK == rank]
                for ids in ids_of_ranks
            ]
            assert of_table.exchange.rows_from == tuple(map(len, received))
            arrived = list(itertools.chain(*received))
            assert of_table.num_selected == sum(min(TOPK, visible_sets[table, i].sum()) for i in arrived)
            if max(SIZES[table]) > TOPK:
                assert of_table.tokens_per_expert is None
            else:
                local = visible_sets[table, arrived, rank * EXPERTS_OF_RANK : (rank + 1) * EXPERTS_OF_RANK]
                assert of_table.tokens_per_expert.tolist() == local.sum(axis=0).tolist()
            if not is_single:
                assert of_table.experts is None
                continue
            by_expert = sorted(range(len(arrived)), key=lambda row: first_expert(arrived[row]))
            assert of_table.experts.by_expert.rows.tolist() == by_expert
            real = [i for i, pad in zip(own, padding_of(token_ids[rank]), strict=True) if not pad]
            load = [sum(first_expert(i) == expert for i in real) for expert in range(visible_sets.shape[2])]
            assert of_table.experts.statistics.tolist() == [len(real), 0, 0, *load]


def padding_of(token_ids: TokenIds) -> list[bool]:
    """Return whether each token is padding, in the order of the layers."""
    is_padding = token_ids.is_padding
    return [False] * token_ids.ids.numel() if is_padding is None else is_padding.T.flatten().tolist()
