"""Plans of several ranks, made in one process, against loops over tokens."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_moe import DEVICE, make_config, make_mask, make_visible_experts, random_visible_sets
from torch import Tensor

from maskmoe.transformer.dispatch.planned import DispatchPlanner
from maskmoe.transformer.token_ids import DispatchPlan, TokenIds

EXPERTS_OF_RANK, TABLES, VOCAB_SIZE, BATCH, SEQUENCE, TOPK = 3, 3, 9, 2, 5, 2


def rank_local_sets(num_ranks: int) -> np.ndarray:
    """Draw visible sets, bool [tables, vocab, N], each on one rank."""
    drawn = random_visible_sets(1, TABLES, VOCAB_SIZE, EXPERTS_OF_RANK)
    rank = np.random.default_rng(2).integers(0, num_ranks, (TABLES, VOCAB_SIZE, 1, 1))
    sets = drawn[:, :, None] & (np.arange(num_ranks)[:, None] == rank)
    return sets.reshape(TABLES, VOCAB_SIZE, -1)


def plan_of_every_rank(
    num_ranks: int, visible_sets: np.ndarray, token_ids: list[TokenIds], monkeypatch: pytest.MonkeyPatch
) -> list[DispatchPlan]:
    """Plan for each rank in turn; the gathering of ids is replaced."""
    config = make_config(num_ranks * EXPERTS_OF_RANK, TOPK, num_layers=TABLES, expert_model_parallel_size=num_ranks)
    visible_experts = make_visible_experts(config, make_mask(visible_sets))
    assert visible_experts.is_rank_local
    sent: dict[int, Tensor] = {}

    def all_gather(gathered: Tensor, own: Tensor, group: SimpleNamespace) -> None:
        sent[group.rank()] = own
        if len(sent) == num_ranks:
            gathered.copy_(torch.cat([sent[rank] for rank in range(num_ranks)]))
        else:
            gathered.copy_(own.expand_as(gathered))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather)
    groups = [SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: num_ranks) for rank in range(num_ranks)]
    planners = [DispatchPlanner(visible_experts, TOPK, [2, 0, 2], group) for group in groups]
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
    for rank, plan in enumerate(plans):
        assert set(plan) == {0, 2}
        for table, of_table in plan.items():

            def destination(token_id: int, table: int = table) -> int:
                return int(visible_sets[table, token_id].argmax()) // EXPERTS_OF_RANK

            own = token_ids[rank].ids.T.flatten().tolist()
            # Rows are sent by destination, then by position.
            by_rank = [[i for i, token_id in enumerate(own) if destination(token_id) == to] for to in range(num_ranks)]
            assert of_table.to_ranks.rows.tolist() == list(itertools.chain(*by_rank))
            assert of_table.to_ranks.is_permutation
            assert of_table.rows_to == tuple(map(len, by_rank))

            # Rows are received by source rank, then by position.
            received = [
                (source, position)
                for source, ids in enumerate(token_ids)
                for position, token_id in enumerate(ids.ids.T.flatten().tolist())
                if destination(token_id) == rank
            ]
            assert of_table.rows_from == tuple(sum(s == source for s, _ in received) for source in range(num_ranks))
            ids = [int(token_ids[source].ids.T.flatten()[position]) for source, position in received]
            assert of_table.received_ids.tolist() == [[token_id] for token_id in ids]
            assert of_table.num_selected == sum(min(TOPK, visible_sets[table, token_id].sum()) for token_id in ids)
            if has_padding:
                padding = [bool(token_ids[source].is_padding.T.flatten()[position]) for source, position in received]
                assert of_table.received_padding.flatten().tolist() == padding
            else:
                assert of_table.received_padding is None
