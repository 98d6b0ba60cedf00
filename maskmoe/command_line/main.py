"""The program `maskmoe`: runs the subcommand that the command line names."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from maskmoe import __version__
from maskmoe.command_line.registry import SUBCOMMANDS
from maskmoe.command_line.run_tool import run_tool
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
    modules = {subcommand.name: subcommand.module for subcommand in SUBCOMMANDS}
    # A name of two words comes first: `mask widen` is another subcommand than `mask`.
    num_words = 2 if " ".join(words[:2]) in modules else 1
    name, arguments = " ".join(words[:num_words]), words[num_words:]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"maskmoe {__version__}")
    elif name in modules:
        # The subcommand's parser takes its program name and its arguments from here.
        sys.argv = [f"maskmoe {name}", *arguments]
        importlib.import_module(modules[name]).main()
    else:
        (nearest,) = difflib.get_close_matches(name, modules, n=1, cutoff=0)
        raise UserError(f"unknown subcommand {name} (nearest: {nearest}); maskmoe --help lists the subcommands")


def help_text() -> str:
    """Return the text of `maskmoe --help`: one line for each subcommand."""
    width = max(len(subcommand.name) for subcommand in SUBCOMMANDS)
    lines = [f"  {subcommand.name:{width}}  {subcommand.help}" for subcommand in SUBCOMMANDS]
    paragraphs = (
        "usage: maskmoe SUBCOMMAND [arguments]",
        "Token-aware mixture-of-experts pretraining on Megatron-Core.",
        "\n".join(lines),
        "maskmoe SUBCOMMAND --help shows the arguments of a subcommand; maskmoe --version prints the version.",
    )
    return "\n\n".join(paragraphs)
