"""The program `maskmoe`: runs the subcommand that the command line names."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from maskmoe import __version__
from maskmoe.cli import run_tool
from maskmoe.commands.registry import SUBCOMMANDS, Subcommand
from maskmoe.errors import UserError


def main() -> None:
    """Run the subcommand that `sys.argv` names; report its errors in one line and by the exit code."""
    run_tool(lambda: dispatch(sys.argv[1:]))


def dispatch(words: Sequence[str]) -> None:
    """Run one subcommand, or print the help or the version.

    Args:
        words: the command line without the program's name.

    Raises:
        UserError: no subcommand is given, or the given one does not exist.
    """
    if not words:
        raise UserError("which subcommand? (maskmoe --help lists the subcommands)")
    name, *arguments = words
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"maskmoe {__version__}")
    else:
        module = importlib.import_module(find_subcommand(name).module)
        # The subcommand's parser takes its program name and its arguments from here.
        sys.argv = [f"maskmoe {name}", *arguments]
        module.main()


def find_subcommand(name: str) -> Subcommand:
    """Return the subcommand with the given name.

    Raises:
        UserError: no subcommand has the name; the message suggests the closest one.
    """
    subcommands = {subcommand.name: subcommand for subcommand in SUBCOMMANDS}
    if name not in subcommands:
        (nearest,) = difflib.get_close_matches(name, subcommands, n=1, cutoff=0)
        raise UserError(f"unknown subcommand {name} (nearest: {nearest}); maskmoe --help lists the subcommands")
    return subcommands[name]


def help_text() -> str:
    """Return the text of `maskmoe --help`: one line for each subcommand."""
    width = max(len(subcommand.name) for subcommand in SUBCOMMANDS)
    lines = [f"  {subcommand.name:{width}}  {subcommand.help}" for subcommand in SUBCOMMANDS]
    return "\n".join(
        [
            "usage: maskmoe SUBCOMMAND [arguments]",
            "",
            "Token-aware mixture-of-experts pretraining on Megatron-Core.",
            "",
            *lines,
            "",
            "maskmoe SUBCOMMAND --help shows the arguments of a subcommand; maskmoe --version prints the version.",
        ]
    )
