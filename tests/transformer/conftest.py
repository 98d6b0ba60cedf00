import pytest


@pytest.fixture(scope="session", autouse=True)
def _process_groups(one_rank) -> None:
    """Every module of Megatron-Core needs process groups."""


@pytest.fixture(autouse=True)
def _no_metrics_of_other_models() -> None:
    """Megatron-Core sizes its records of router losses and of predictions by the first model of a process."""
    # Import after `prepare_process`.
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    get_moe_metrics_tracker().metrics.clear()
    MTPLossLoggingHelper.tracker.clear()
