"""Layers on GPUs over NCCL; the same checks run on CPU cores over gloo.

On one GPU, the expert-parallel group has one rank, and dispatchers are built directly, because a layer on one rank
would choose Megatron-Core's.
"""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from support.launchers import RANK_SCRIPTS, RunRanks
from support.places import PLACES, Place

CHECKS = ("device", "dispatch", "experts", "waits")
# bf16 has 8 significant bits, and several roundings follow one another. The difference relates to the largest value.
BF16_TOLERANCE = 2e-2

Check = Callable[[Place, str], list[Any]]


@pytest.fixture(scope="module")
def check(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Return a function that runs a check of `device_ranks.py` and returns the results of each rank."""

    @cache
    def run(place: Place, checks: tuple[str, ...]) -> list[dict[str, Any]]:
        folder, num_ranks = tmp_path_factory.mktemp("device"), place.num_ranks()
        script = RANK_SCRIPTS / "device_ranks.py"
        run_ranks(script, folder, *checks, world_size=num_ranks, sees_gpus=place.is_gpu)
        return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]

    def check(place: Place, name: str) -> list[Any]:
        # A failure on a GPU can make later work of its process fail, so each check has a process of its own there.
        return [results[name] for results in run(place, (name,) if place.is_gpu else CHECKS)]

    return check


@pytest.mark.parametrize("place", PLACES)
def test_everything_is_on_the_device(place: Place, check: Check) -> None:
    for found in check(place, "device"):
        assert found["devices"] == (["cuda"] if place.is_gpu else ["cpu"])
        assert found["backend"] == ("nccl" if place.is_gpu else "gloo")
        assert (found["kernels"] > 0) is place.is_gpu
        assert (found["device_seconds"] > 0) is place.is_gpu


@pytest.mark.parametrize("place", PLACES)
def test_dispatch_is_bit_equal_to_megatrons(place: Place, check: Check) -> None:
    """Each token has two experts, so every sum has two terms and does not depend on their order."""
    for found in check(place, "dispatch"):
        assert len(found) == 24
        for name, difference in found.items():
            assert difference == 0, name


@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_experts_without_rows_are_zero(place: Place, check: Check) -> None:
    for found in check(place, "experts"):
        assert found["is_grouped"] is place.is_gpu
        assert len(found["zero"]) == 4
        assert all(found["zero"].values()), found["zero"]
        # NaN is not below the tolerance either.
        assert len(found["differences"]) == 7
        assert all(value < BF16_TOLERANCE for value in found["differences"].values()), found["differences"]


@pytest.mark.parametrize("place", PLACES)
def test_host_waits(place: Place, check: Check) -> None:
    """Experts on a CPU take turns and read the number of their rows: one wait, unless the number is on the host."""
    waits_of_experts = 0 if place.is_gpu else 1
    expected = {
        "planned, no experts": 0,
        "planned, experts": waits_of_experts,
        "one_copy, no experts": 1,
        "one_copy, experts": 1,
    }
    for found in check(place, "waits"):
        assert {name: of_layer["waits"] for name, of_layer in found.items()} == expected, found
        if place.is_gpu:
            assert found["planned, experts"]["first"] is None, found["planned, experts"]["first"]
