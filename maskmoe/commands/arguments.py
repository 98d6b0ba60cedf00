"""Parsers of the command line, and arguments that several subcommands share."""

import argparse

from maskmoe import ranges
from maskmoe.command_line import Parser


def command_parser(documentation: str | None) -> Parser:
    """Return a parser whose help is the docstring of a command's module.

    The docstring's part from its examples on is shown after the arguments; `%(prog)s` stands for the program.
    """
    description, _, examples = (documentation or "").partition("\nExample")
    return Parser(
        description=description, epilog=f"example{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_text_arguments(parser: argparse.ArgumentParser, purpose: str, meaning_of_keys: str) -> None:
    """Add the flags that name text files and the keys of their JSON lines."""
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=f"text files{purpose}")
    keys = f"keys of the JSON objects that hold {meaning_of_keys} (default: text)"
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the number of processes."""
    meaning = "number of processes; does not change the result (default: number of available cores)"
    parser.add_argument("--workers", type=ranges.PROCESSES, metavar="W", help=meaning)


def add_seed_argument(parser: argparse._ActionsContainer, purpose: str) -> None:
    """Add the flag for the seed of something random."""
    parser.add_argument(
        "--seed", type=ranges.SEED, default=0, metavar="S", help=f"seed of {purpose} (default: %(default)s)"
    )
