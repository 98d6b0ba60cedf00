"""Checks of a run's command line in this process, for the tests of checkpoints."""

import sys
from argparse import Namespace
from collections.abc import Callable

import pytest
from support.command_lines import forget_megatrons_globals
from support.training import Run


@pytest.fixture(scope="session")
def parse(workplace, tmp_path_factory) -> Callable[[str], Namespace]:
    """Run the checks of a run's command line, and return its arguments."""
    from maskmoe.training.settings.checks import parse_and_check_args
    from maskmoe.training.settings.flags import add_pretraining_arguments

    folder = tmp_path_factory.mktemp("parsed")

    def parse(flags: str) -> Namespace:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(workplace.folder)
            patch.setattr(sys, "argv", ["pretrain", *workplace.flags(Run(flags, logs_scalars=False), folder)])
            try:
                return parse_and_check_args(add_pretraining_arguments).args
            finally:
                forget_megatrons_globals()

    return parse
