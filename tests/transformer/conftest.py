import pytest


@pytest.fixture(scope="session", autouse=True)
def _process_groups(one_rank) -> None:
    """Every module of Megatron-Core needs process groups."""


@pytest.fixture(autouse=True)
def _no_metrics_of_other_models() -> None:
    """Megatron-Core sizes its record of router losses by the first model of a process."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # after `prepare_process`

    get_moe_metrics_tracker().metrics.clear()
