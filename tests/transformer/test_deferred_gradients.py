"""Experts that defer their weights' gradients, as Transformer Engine's do, are trained by two real ranks."""

import pytest
import torch
from support.launchers import RANK_SCRIPTS, RunRanks
from support.ranks.deferred_gradients_ranks import MASKS


@pytest.fixture(scope="module")
def ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("deferred_gradients")
    run_ranks(RANK_SCRIPTS / "deferred_gradients_ranks.py", folder, are_preloaded=False)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare up to rounding: dispatch of another kind adds up the copies of a token in another order."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_deferred_gradients_equal_gradients_of_the_backward_pass(mask: str, ranks: list[dict]) -> None:
    for results in ranks:
        computed, deferred = dict(results[mask, "computed"]), dict(results[mask, "deferred"])
        assert computed.pop("dispatcher") in ("OneCopyDispatcher", "PlannedDispatcher")
        assert deferred.pop("dispatcher") == "StockDispatcher"
        assert_equal_gradients(deferred, computed)


def test_data_parallelism_sees_deferred_gradients_only_in_the_supported_combination(ranks: list[dict]) -> None:
    """The optimizer reads `main_grad`. The other combinations are refused, see `test_refused_settings`."""
    for results in ranks:
        expected = results["computed", True, False]
        assert_equal_gradients(results["deferred", True, False], expected)
        for fused, overlap in ((False, False), (True, True)):
            found = results["deferred", fused, overlap]
            assert not any(torch.allclose(found[name], gradient) for name, gradient in expected.items())
