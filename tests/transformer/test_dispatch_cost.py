"""Collectives, their bytes, and host waits of dispatch in a model of several layers."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from meter import Cost, cost_of
from support.small_moe import DEVICE, initialize_parallelism, make_config, make_mask, make_model, random_visible_sets

CROSSINGS = 4  # Dispatch and combine, forward and backward.

NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE, TOKENS, HIDDEN = 3, 8, 11, 16, 8
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {
    "planned": (True, {}),
    "planned_recomputed": (True, RECOMPUTE),
    "one_copy": (False, {}),
}


def visible_sets(is_rank_local: bool) -> np.ndarray:
    """Return visible sets, bool [layers, vocab, N]: rank-local for two ranks, or all experts for every id."""
    visible = np.ones((NUM_LAYERS, VOCAB_SIZE, NUM_EXPERTS), bool)
    if is_rank_local:
        half = NUM_EXPERTS // 2
        drawn = random_visible_sets(1, NUM_LAYERS, VOCAB_SIZE, half)
        is_first = np.random.default_rng(2).random((NUM_LAYERS, VOCAB_SIZE, 1)) < 0.5
        visible = np.concatenate([drawn & is_first, drawn & ~is_first], axis=-1)
    return visible


def count(is_rank_local: bool, settings: dict[str, Any], rank: int) -> Cost:
    """Run a case forward and backward and return its cost; arguments as in `CASES`."""
    config = make_config(
        NUM_EXPERTS, topk=2, num_layers=NUM_LAYERS, hidden_size=HIDDEN, expert_model_parallel_size=2, **settings
    )
    model = make_model(config, make_mask(visible_sets(is_rank_local)), TOKENS)
    ids = torch.from_numpy(np.random.default_rng(rank).integers(0, VOCAB_SIZE, (1, TOKENS))).to(DEVICE)
    position_ids = torch.arange(TOKENS, device=DEVICE).unsqueeze(0)
    # Compute logits only, because cross entropy has collectives of its own.
    return cost_of(lambda: model(ids, position_ids, None).mean().backward())


def costs_of_rank() -> dict[str, dict[str, int]]:
    """Return the costs of a rank by case."""
    initialize_parallelism(expert_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    return {name: asdict(count(*case, rank)) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def costs(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """Return the costs of each of two ranks, by case."""
    return run_ranks(costs_of_rank, tmp_path_factory.mktemp("dispatch_cost"))


def bytes_of_both(costs: list[dict[str, dict[str, int]]], case: str) -> int:
    """Add up the bytes that both ranks put into all-to-alls."""
    return sum(of_rank[case]["all_to_all_bytes"] for of_rank in costs)


def test_planned_layers_exchange_hidden_states_and_nothing_else(costs) -> None:
    """Each micro-batch exchanges ids and waits once; each layer waits once, as experts need counts on the host."""
    for of_rank in costs:
        found = of_rank["planned"]
        assert found["all_to_alls"] == CROSSINGS * NUM_LAYERS
        assert found["other_collectives"] == 1
        assert found["host_waits"] == 1 + NUM_LAYERS
    assert bytes_of_both(costs, "planned") == CROSSINGS * NUM_LAYERS * 2 * TOKENS * HIDDEN * 4


def test_recomputation_uses_the_same_plan(costs) -> None:
    for of_rank in costs:
        found = of_rank["planned_recomputed"]
        assert found["all_to_alls"] == (CROSSINGS + 2) * NUM_LAYERS
        assert found["other_collectives"] == 1
        assert found["host_waits"] == 1 + 2 * NUM_LAYERS


def test_one_copy_also_exchanges_counts_and_weights(costs) -> None:
    for of_rank in costs:
        found = of_rank["one_copy"]
        assert found["all_to_alls"] == (CROSSINGS + 2) * NUM_LAYERS
        assert found["other_collectives"] == NUM_LAYERS
        assert found["host_waits"] == NUM_LAYERS
