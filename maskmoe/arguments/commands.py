"""The parser of the commands that are no training, and the arguments that several commands share."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import OneLineParser, add_option
from maskmoe.errors import UserError


class Parser(OneLineParser):
    """A parser of all arguments of a command, which refuses a list that is given twice."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line, after a check for repeated flags that take several values."""
        words = list(sys.argv[1:] if args is None else args)
        takes_other_flags = any(action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions)
        if not takes_other_flags:
            _refuse_repeated_lists(self, words)
        return super().parse_known_args(words, namespace)

    def option_names(self) -> frozenset[str]:
        """Return the names of all options, with their dashes."""
        return frozenset(self._option_string_actions)


def _refuse_repeated_lists(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag with several values that is given twice, since argparse would silently drop its first values.

    Raises:
        UserError: Names the flag.
    """
    given = [word.partition("=")[0] for word in words[: [*words, "--"].index("--")]]
    for action in parser._actions:
        if isinstance(action, argparse._StoreAction) and action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE):
            flags = [word for word in given if word in action.option_strings]
            if len(flags) > 1:
                raise UserError(f"{flags[-1]} is given {len(flags)} times: write all its values after one {flags[-1]}")


def add_force_argument(parser: argparse._ActionsContainer) -> None:
    """Add the flag that lets a command replace its earlier outputs, see `maskmoe.files.output_checks.check_outputs`."""
    meaning = "replace output files that exist; inputs are never replaced"
    parser.add_argument("--force", action="store_true", help=meaning)


def command_parser(documentation: str | None) -> Parser:
    """Return a parser whose help is the docstring of a command's module.

    The docstring's part from its examples on is shown after the arguments; `%(prog)s` stands for the program.
    """
    description, _, examples = (documentation or "").partition("\nExample")
    return Parser(
        description=description, epilog=f"example{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the number of processes."""
    meaning = "number of processes; does not change the result (default: number of available cores)"
    add_option(parser, "--workers W", meaning, ranges.PROCESSES)


def add_seed_argument(parser: argparse._ActionsContainer, purpose: str, default: int = 0) -> None:
    """Add the flag for the seed of something random."""
    add_option(parser, "--seed S", f"seed of {purpose}", ranges.SEED, default=default)


def say_loading(phase: str) -> None:
    """Print what a command does, such as "reading the model", to stderr before it can show a progress bar."""
    print(f"loading: {phase}", file=sys.stderr, flush=True)
