import sys
from pathlib import Path

import pytest

# Makes `small_moe` importable, also by the test modules: pytest leaves the import path alone.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _process_groups(one_rank) -> None:
    """Every module of Megatron-Core needs process groups."""
