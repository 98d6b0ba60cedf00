"""The arguments of `--check`; this module imports neither PyTorch nor Megatron."""

import os
from argparse import ArgumentParser

from maskmoe.arguments.parser import add_option
from maskmoe.training.settings.arguments import positive


def add_check_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments of `maskmoe.training.check`, which reports on a run instead of starting it."""
    parser.add_argument(
        "--check",
        metavar="RANKS",
        type=positive,
        nargs="?",
        const=os.environ.get("WORLD_SIZE", "1"),
        help="do not train. Check the other arguments and all files for a run of RANKS processes, one for each GPU, by "
        "default WORLD_SIZE or 1; print layout, parameters, memory and cost of the run, and its errors. Needs no "
        "GPU and no torchrun. On a machine without GPUs, the check assumes GPUs with Transformer Engine "
        "unless --distributed-backend gloo is given",
    )
    keys = "also write the report of --check as JSON; maskmoe/training/preflight/report.py documents its keys"
    add_option(parser, "--json FILE", keys, dest="check_json")
    force = "replace the file in --json if it exists; an input is never replaced"
    parser.add_argument("--force", action="store_true", help=force)
    return parser
