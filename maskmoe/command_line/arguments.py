"""Parsers of the command line, and arguments that several subcommands share."""

import argparse
from typing import Any

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Parser
from maskmoe.data.inputs import FORMATS, ReadingOptions, unescape


def command_parser(documentation: str | None) -> Parser:
    """Return a parser whose help is the docstring of a command's module.

    The docstring's part from its examples on is shown after the arguments; `%(prog)s` stands for the program.
    """
    description, _, examples = (documentation or "").partition("\nExample")
    return Parser(
        description=description, epilog=f"example{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_text_arguments(
    parser: argparse.ArgumentParser,
    purpose: str,
    meaning_of_keys: str,
    sources: argparse._ActionsContainer | None = None,
) -> None:
    """Add the flags that name texts, say how they are read, and name the keys that hold the text.

    Args:
        parser: The parser.
        purpose: Purpose of the texts, for the help.
        meaning_of_keys: Content of the keys, for the help.
        sources: Group that `--input` belongs to if another flag of the group can replace it.
    """
    (sources or parser).add_argument(
        "--input",
        nargs="+",
        required=sources is None,
        metavar="FILE",
        help=f"texts{purpose}: files; folders that `save_to_disk` of Hugging Face's datasets has written; or - for "
        "standard input",
    )
    parser.add_argument(
        "--input-format",
        choices=FORMATS,
        help="format of all inputs (default: as the file's name ends; jsonl for standard input and pipes)",
    )
    keys = f"keys of the JSON objects, or names of the columns, that hold {meaning_of_keys} (default: text)"
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    parser.add_argument(
        "--document-separator",
        metavar="TEXT",
        help=r"text between two documents of a plain text file, such as '\n\n' or '<|endoftext|>'; the separator is "
        "left out (default: a file is a document)",
    )


def pop_reading_options(settings: dict[str, Any]) -> ReadingOptions:
    """Remove the flags that say how texts are read from the parsed flags, and return their values.

    Raises:
        UserError: The separator has an unknown escape.
    """
    separator = settings.pop("document_separator")
    return ReadingOptions(settings.pop("input_format"), None if separator is None else unescape(separator))


def add_workers_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag for the number of processes."""
    meaning = "number of processes; does not change the result (default: number of available cores)"
    parser.add_argument("--workers", type=ranges.PROCESSES, metavar="W", help=meaning)


def add_seed_argument(parser: argparse._ActionsContainer, purpose: str) -> None:
    """Add the flag for the seed of something random."""
    parser.add_argument(
        "--seed", type=ranges.SEED, default=0, metavar="S", help=f"seed of {purpose} (default: %(default)s)"
    )
