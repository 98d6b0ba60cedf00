"""Real training runs of a tiny model, started once and shared by the tests of this folder.

A test names the runs that it looks at with `@pytest.mark.runs(name, …)` and gets their outcomes, in that order, from
the fixture `runs`. All runs that the selected tests name are queued with the first of them, which is the first test of
the session, and run two at a time.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.command_lines import forget_megatrons_globals
from support.training import Run, TrainingOutcome, Workplace
from support.training_runs import RUNS


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "runs(*names): runs of tests/support/training_runs.py that a test looks at")


@pytest.hookimpl(trylast=True)  # after the tests that are not selected have been left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with a test that queues the shared runs, which then run beside the tests of other folders."""
    for item in items:
        if item.get_closest_marker("runs"):
            items.remove(item)
            items.insert(0, item)
            break


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def start_by_name(
    request: pytest.FixtureRequest, workplace: Workplace
) -> Iterator[Callable[[str], Future[TrainingOutcome]]]:
    """Queue one of `RUNS` once.

    The runs that the selected tests name are queued at first use of this fixture, in the order of the tests. A name
    that is not in `RUNS` is left to the test that uses the name, which then fails.
    """
    pool = ThreadPoolExecutor(max_workers=max(2, (os.cpu_count() or 1) // 2))
    (workplace.folder / "runs").mkdir()

    @cache
    def start_by_name(name: str) -> Future[TrainingOutcome]:
        if name not in RUNS:
            pytest.fail(f"there is no run {name!r} in tests/support/training_runs.py")
        run = RUNS[name]
        source = start_by_name(run.continues) if run.continues else None
        folder = workplace.folder / "runs" / re.sub(r"\W+", "_", name)
        return pool.submit(lambda: workplace.run(run, folder, source and source.result().checkpoints))

    for item in request.session.items:
        for mark in item.iter_markers("runs"):
            for name in mark.args:
                if name in RUNS and (RUNS[name].continues or name) in RUNS:
                    start_by_name(name)
    yield start_by_name
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def parse(workplace: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Namespace]:
    """Run the checks of a run's command line in this process, and return its arguments."""
    from maskmoe.training.run_checks import parse_and_check_args
    from maskmoe.training.settings.arguments import add_pretraining_arguments

    folder = tmp_path_factory.mktemp("parsed")

    def parse(flags: str, **settings: Any) -> Namespace:
        words = workplace.flags(Run(flags, logs_scalars=False, **settings), folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workplace.folder)
            patch.setattr(sys, "argv", ["pretrain", *words])
            try:
                return parse_and_check_args(add_pretraining_arguments).args
            finally:
                forget_megatrons_globals()

    return parse


@pytest.fixture
def runs(
    request: pytest.FixtureRequest, start_by_name: Callable[[str], Future[TrainingOutcome]]
) -> list[TrainingOutcome]:
    """Return the outcomes of the runs that the test's mark `runs` names, all of which ended well."""
    outcomes = [start_by_name(name).result() for mark in request.node.iter_markers("runs") for name in mark.args]
    for outcome in outcomes:
        if any(outcome.exit_codes):
            pytest.fail(f"{outcome.folder.name}: {outcome.report()}")
    return outcomes


@pytest.fixture(scope="session")
def files_and_times() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """Return the size and the time of change in nanoseconds of a folder and everything below it, by path."""

    def read(folder: Path) -> dict[str, tuple[int, int]]:
        stats = {path: path.lstat() for path in (folder, *folder.rglob("*"))}
        return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}

    return read
