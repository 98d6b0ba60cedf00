"""The program `maskmoe`: its subcommands, and the run of the one that the command line names."""

import importlib
import sys
from collections.abc import Sequence

from maskmoe import __version__
from maskmoe.errors import UserError
from maskmoe.processes.run_tool import run_tool

_ENTRY_POINTS = "maskmoe.training."

SUBCOMMANDS = {
    "corpus": ("command_line.make_corpus", "collect the text of Python packages as a training corpus"),
    "tokenizer": ("command_line.train_tokenizer", "train a SentencePiece tokenizer on raw text"),
    "preprocess": ("command_line.preprocess_data", "tokenize raw text into a Megatron dataset"),
    "count": ("command_line.count_token_frequency", "count how often each token id occurs in a dataset"),
    "mask": ("command_line.build_routing_mask", "build the routing mask from token frequencies"),
    "pretrain": ("command_line.pretrain", "pretrain a model file on one node or many, with restarts"),
    "evaluate": ("training.evaluate", "compute a checkpoint's loss by token frequency"),
    "generate": ("command_line.generate_text", "continue prompts with a checkpoint or an exported model"),
    "check": ("command_line.check", "check a model file's settings and show what the run needs"),
    "status": ("command_line.status", "show a run's progress and its checkpoints, from its run folder"),
    "convert": ("command_line.convert_checkpoint", "convert checkpoints to and from Hugging Face's format"),
    "analyze": ("command_line.analyze_routing", "show how checkpoints route a text to experts"),
    "prune": ("command_line.prune_checkpoints", "delete the old checkpoints of a finished run"),
    "compare": ("command_line.compare", "train and compare the variants of a suite"),
}
"""Module and help of each subcommand, in the order of `maskmoe --help`: a run's steps first, then analysis.

A name is the word after `maskmoe`. The `main()` of the module below `maskmoe` reads `sys.argv` and
does the work, or the module is the entry point that every rank runs. Only the chosen module is imported, so that
`maskmoe --help` does not wait for torch.
"""


def main() -> None:
    """Run the subcommand that `sys.argv` names; report its errors in one line and by the exit code."""
    run_tool(lambda: dispatch(sys.argv[1:]))


def dispatch(words: Sequence[str]) -> None:
    """Run one subcommand, or print the help or the version.

    Args:
        words: The command line without the program's name.

    Raises:
        UserError: No subcommand is given, or the given one does not exist.
    """
    if not words:
        raise UserError("missing subcommand: see maskmoe --help")
    name, *arguments = words
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"maskmoe {__version__}")
    elif name in SUBCOMMANDS:
        # The subcommand's parser takes its program name and its arguments from here.
        sys.argv = [f"maskmoe {name}", *arguments]
        module = f"maskmoe.{SUBCOMMANDS[name][0]}"
        if module.startswith(_ENTRY_POINTS):
            from maskmoe.launch.launcher import run_entry_point
            from maskmoe.training.help_page import help_page

            if {"-h", "--help"}.intersection(arguments):
                print(help_page(name), end="")
                return
            run_entry_point(("-m", module), arguments)
        importlib.import_module(module).main()
    else:
        raise UserError(f"unknown subcommand {name}; maskmoe --help lists the subcommands")


def help_text() -> str:
    """Return the text of `maskmoe --help`: one line for each subcommand."""
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {help}" for name, (_, help) in SUBCOMMANDS.items()]
    paragraphs = (
        "usage: maskmoe SUBCOMMAND [arguments]",
        "Token-aware mixture-of-experts pretraining on Megatron-Core.",
        "\n".join(lines),
        "maskmoe SUBCOMMAND --help shows the arguments of a subcommand; maskmoe --version prints the version.",
    )
    return "\n\n".join(paragraphs)
