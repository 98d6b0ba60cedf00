"""`maskmoe pretrain`: pretrains the model of a model file on one node or many."""

import os
import sys

from maskmoe.launch.launcher import launch, run_entry_point
from maskmoe.launch.options import options_parser
from maskmoe.launch.torchrun_command import entry_point


def main() -> None:
    """Launch the model file that `sys.argv` names."""
    words = sys.argv[1:]
    if "--help-all" in words:
        run_entry_point(entry_point("pretrain"), words)
    if {"-h", "--help"}.intersection(words):
        # Only now: other runs do not need the page.
        from maskmoe.training.help_page import help_page

        parser = options_parser("maskmoe pretrain", os.environ)
        print(parser.format_help(), help_page("pretrain"), sep="\n")
        return
    launch("maskmoe pretrain", words)
