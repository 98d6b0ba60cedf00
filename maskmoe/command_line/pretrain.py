"""`maskmoe pretrain`: pretrains the model of a model file on one node or many, or from Megatron's flags alone."""

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

from maskmoe.errors import UserError
from maskmoe.launch.command import entry_point
from maskmoe.launch.launcher import launch, run_entry_point
from maskmoe.launch.options import launcher_options

_SUFFIXES = (".yaml", ".yml")
_CHECK = "--check"
_SWITCHES = (_CHECK, "--dry-run", "--verbose")  # options of the launcher that take no value
_FLAG = re.compile(r"--[^=]*")  # its value is the next word
_HELP_FLAGS = {"-h", "--help"}


def main() -> None:
    """Launch the model file that `sys.argv` names; without one, train with Megatron's flags on this machine.

    Raises:
        UserError: The command line has options of the launcher, but no model file.
    """
    words = sys.argv[1:]
    # Schedulers, such as Kubeflow, set RANK to the number of the node. Only torchrun also sets LOCAL_RANK.
    is_rank = "LOCAL_RANK" in os.environ
    if _HELP_FLAGS.intersection(words) and not is_rank:
        # First the options of the launcher, then the flags of training.
        with suppress(SystemExit):
            launch("maskmoe pretrain", ["--help"])
        sys.stdout.flush()
        sys.argv[1:] = ["--help"]
        run_entry_point(entry_point("pretrain"), saves_checkpoints=True)
    if is_rank or has_flags_only(words):
        is_check = any(word.partition("=")[0] == _CHECK for word in words)
        if own := [name for name in launcher_options(words) if name != _CHECK]:
            raise UserError(f"{own[0]} needs a model file: write MODEL.yaml after the options of maskmoe pretrain")
        run_entry_point(entry_point("check" if is_check else "pretrain"), saves_checkpoints=not is_check)
    launch("maskmoe pretrain", words)


def has_flags_only(words: Sequence[str]) -> bool:
    """Return whether a command line gives Megatron's flags without a model file.

    The name of a model file ends in `.yaml` or `.yml`, and is not the value of a flag.
    """
    has_model_file = any(
        word.endswith(_SUFFIXES) and not word.startswith("-") and (before in _SWITCHES or not _FLAG.fullmatch(before))
        for before, word in pairwise(("", *words))
    )
    return bool(words) and words[0].startswith("--") and not has_model_file
