"""Prepares the process for Megatron before any test module imports it, and starts gloo ranks."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.launchers import RunRanks, run_as_ranks
from support.paths import ROOT
from support.places import num_gpus
from support.system import install_handlers

from maskmoe.megatron_compat import prepare_process

# Tests must not fail because a busy machine is slow. Fixtures that examples share hold files that no example changes.
LENIENT = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25
)
settings.register_profile("quick", LENIENT)
settings.register_profile("thorough", LENIENT, max_examples=100)  # for `tests/run.sh --all`
settings.load_profile("quick")

install_handlers()


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        config.addinivalue_line("filterwarnings", "default")  # pyproject.toml names only the warnings on CPUs.
    prepare_process()


SHARING_FOLDERS = ("conversion", "analysis", "data")
"""Folders whose tests share session fixtures that take long."""

FILES_OF_SINGLES = ("tests/docs/test_commands_run.py", "tests/launch/test_agent.py")
"""Files whose tests take long and share nothing."""


@cache
def looks_at_runs(file: str) -> bool:
    """Return whether a file has tests of the shared training runs, which `training/conftest.py` starts."""
    return re.search(r"mark\.runs\(|run_pairs\(|start_by_name", (ROOT / file).read_text()) is not None


@pytest.hookimpl(optionalhook=True, tryfirst=True)  # pytest-xdist defines the hook and calls the first that answers
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give tests that share fixtures to one process: the tests of a file, of a folder, or of the training runs."""
    from xdist.scheduler import LoadScopeScheduling

    class FixtureScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            folder = re.match(rf"tests/({'|'.join(SHARING_FOLDERS)})/", file)
            if folder:
                return folder.group()
            if file in FILES_OF_SINGLES:
                return nodeid
            return "the training runs" if looks_at_runs(file) else file

    return FixtureScheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not num_gpus():
        pytest.skip("this machine has no GPU that torch finds")


@pytest.fixture(autouse=True)
def signal_handlers() -> None:
    """Restore the handlers of signals that launchers and Megatron, run in this process by any fixture, replaced."""
    install_handlers()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[None]:
    """Initialise Megatron's process groups, each with this process as the only rank."""
    from megatron.core import parallel_state
    from support.small_moe import initialize_parallelism

    torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    initialize_parallelism()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Return `run_as_ranks`, which runs a function as the ranks of one group."""
    return run_as_ranks
