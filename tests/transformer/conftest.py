import pytest


@pytest.fixture(scope="session", autouse=True)
def _process_groups(one_rank) -> None:
    """Every module of Megatron-Core needs process groups."""
