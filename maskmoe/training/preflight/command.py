"""The command `--check` of pretraining."""

import io
import json
import logging
import sys
import warnings
from argparse import Namespace
from contextlib import redirect_stdout

from maskmoe.command_line.parser import OneLineParser
from maskmoe.command_line.run_tool import EXIT_BAD_INPUT
from maskmoe.errors import UserError
from maskmoe.training.preflight.inspection import Inspection
from maskmoe.training.preflight.report import Report
from maskmoe.training.settings.arguments import add_check_argument
from maskmoe.training.settings.setup import ArgumentsProvider


def requested_check() -> Namespace:
    """Return `check` and `check_json` of the command line of this process; without `--check`, `check` is None.

    Raises:
        UserError: the number of ranks is not a number of at least 1, or `--json` is given without `--check`.
    """
    parser = add_check_argument(OneLineParser(add_help=False))
    request, _ = parser.parse_known_args()
    if request.check is None and request.check_json:
        raise UserError("--json is the form of the report of --check: pass --check, too")
    return request


def check_run(ranks: int, as_json: bool, extra_args_provider: ArgumentsProvider) -> None:
    """Print what a run with this command line would be and need; exit with code 2 if the run would be refused.

    The report goes to stdout. Each error also goes to stderr, as a line that begins with `error: `.

    Args:
        ranks: the number of ranks of the run.
        as_json: print the report as JSON instead of text.
        extra_args_provider: adds the arguments of the entry point to the common arguments.
    """
    report = inspect_run(ranks, extra_args_provider)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) if as_json else report.to_text()
    print(text, flush=True)
    for error in report.errors:
        print(f"error: {error}", file=sys.stderr)
    if report.errors:
        sys.exit(EXIT_BAD_INPUT)


def inspect_run(ranks: int, extra_args_provider: ArgumentsProvider) -> Report:
    """Check a run with the command line of this process, and work out its layout, parameters and memory.

    Args:
        ranks: the number of ranks of the run.
        extra_args_provider: adds the arguments of the entry point to the common arguments.
    """
    # Drop everything that Megatron prints, logs and warns of while it parses, validates and builds.
    logging.disable(logging.WARNING)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            return Inspection(ranks, extra_args_provider).report()
        except UserError as error:
            return Report((str(error),))
