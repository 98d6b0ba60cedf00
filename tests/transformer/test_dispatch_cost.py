"""Collectives and host waits of planned dispatch in a model of several layers."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from meter import Cost, cost_of
from support.small_moe import DEVICE, initialize_parallelism, make_config, make_mask, make_model, visible_halves

CROSSINGS = 4  # Dispatch and combine, forward and backward.

NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE, TOKENS, HIDDEN = 3, 8, 11, 16, 8
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
CASES = {"planned": {}, "planned_recomputed": RECOMPUTE}


def count(settings: dict[str, Any], rank: int) -> Cost:
    """Run a model with further settings forward and backward, and return the cost."""
    config = make_config(
        NUM_EXPERTS, topk=2, num_layers=NUM_LAYERS, hidden_size=HIDDEN, expert_model_parallel_size=2, **settings
    )
    mask = make_mask(visible_halves(VOCAB_SIZE, NUM_EXPERTS).repeat(NUM_LAYERS, axis=0))
    model = make_model(config, mask, TOKENS)
    ids = torch.from_numpy(np.random.default_rng(rank).integers(0, VOCAB_SIZE, (1, TOKENS))).to(DEVICE)
    position_ids = torch.arange(TOKENS, device=DEVICE).unsqueeze(0)
    # Compute logits only, because cross entropy has collectives of its own.
    return cost_of(lambda: model(ids, position_ids, None).mean().backward())


def costs_of_rank() -> dict[str, dict[str, int]]:
    """Return the costs of a rank by case."""
    initialize_parallelism(expert_model_parallel_size=2)
    rank = torch.distributed.get_rank()
    return {name: asdict(count(settings, rank)) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def costs(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """Return the costs of each of two ranks, by case."""
    return run_ranks(costs_of_rank, tmp_path_factory.mktemp("dispatch_cost"))


def test_planned_layers_exchange_hidden_states_and_nothing_else(costs) -> None:
    """Each micro-batch exchanges ids and waits once; each layer waits once, as experts need counts on the host."""
    for of_rank in costs:
        found = of_rank["planned"]
        assert found["all_to_alls"] == CROSSINGS * NUM_LAYERS
        assert found["other_collectives"] == 1
        assert found["host_waits"] == 1 + NUM_LAYERS


def test_recomputation_uses_the_same_plan(costs) -> None:
    for of_rank in costs:
        found = of_rank["planned_recomputed"]
        assert found["all_to_alls"] == (CROSSINGS + 2) * NUM_LAYERS
        assert found["other_collectives"] == 1
        assert found["host_waits"] == 1 + 2 * NUM_LAYERS
