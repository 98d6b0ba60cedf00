"""Remove all checkpoints of a finished run but the newest whole ones.

For a series that was kept to be looked at, when that is done. Training itself keeps fewer with --keep-last-checkpoints.
"""

import argparse
from pathlib import Path

from maskmoe.megatron_compat import prepare_process

prepare_process()
from maskmoe.checkpoint.series import choose_checkpoint, remove_old_checkpoints
from maskmoe.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python tools/thin_checkpoints.py --load runs/a/checkpoints",
    )
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of Megatron checkpoints")
    parser.add_argument(
        "--keep-last-checkpoints", type=int, default=1, metavar="K", help="how many stay (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.keep_last_checkpoints < 1:
        raise UserError(f"--keep-last-checkpoints must be at least 1, not {arguments.keep_last_checkpoints}")
    if choose_checkpoint(arguments.load).checkpoint is None:
        raise UserError(f"--load {arguments.load} holds no checkpoint")
    for checkpoint in remove_old_checkpoints(arguments.load, arguments.keep_last_checkpoints):
        print(f"removed  {checkpoint}")
