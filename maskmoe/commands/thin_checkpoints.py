"""Remove all checkpoints of a finished run but the newest sound checkpoints.

Use this command when the series of checkpoints is no longer needed. Training with --keep-last-checkpoints keeps fewer
checkpoints from the start.

Example:
  %(prog)s --load runs/a/checkpoints
"""

from pathlib import Path

from maskmoe import ranges
from maskmoe.commands.arguments import command_parser
from maskmoe.errors import UserError


def main() -> None:
    """Remove the old checkpoints of the run that the command line names."""
    parser = command_parser(__doc__)
    parser.add_argument("--load", type=Path, required=True, metavar="DIR", help="folder of Megatron checkpoints")
    keep = "number of checkpoints to keep (default: %(default)s)"
    parser.add_argument("--keep-last-checkpoints", type=ranges.CHECKPOINTS, default=1, metavar="K", help=keep)
    arguments = parser.parse_args()

    # Reading checkpoints needs torch and Megatron, `--help` does not.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.checkpoint.series import choose_checkpoint, remove_old_checkpoints

    if choose_checkpoint(arguments.load).checkpoint is None:
        raise UserError(f"--load {arguments.load} holds no checkpoint")
    for checkpoint in remove_old_checkpoints(arguments.load, arguments.keep_last_checkpoints):
        print(f"removed  {checkpoint}")
