"""Collectives, their bytes, and host waits of dispatch in a model of several layers."""

import json

import pytest
from support.launchers import RANK_SCRIPTS
from support.ranks.dispatch_cost_ranks import HIDDEN, NUM_LAYERS, TOKENS

CROSSINGS = 4  # Dispatch and combine, forward and backward.


@pytest.fixture(scope="module")
def costs(run_ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, int]]]:
    """Return the costs of each of two ranks, by case."""
    folder = tmp_path_factory.mktemp("dispatch_cost")
    run_ranks(RANK_SCRIPTS / "dispatch_cost_ranks.py", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


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
