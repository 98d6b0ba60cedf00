"""Remove all checkpoints of a finished run but the newest intact checkpoints.

Checkpoints that are newer than the one from which the run would resume stay, too: they are damaged, or the run has gone
back beyond them. A checkpoint counts as intact if its files have the content that was saved, so the command reads all
bytes of the checkpoints that it counts. Checkpoints without digests (integrity.json) count only if none has digests.

Use this command when the series of checkpoints is no longer needed. Training with --keep-last-checkpoints keeps fewer
checkpoints from the start.

Examples:
  %(prog)s --load runs/a/checkpoints --dry-run
  %(prog)s --load runs/a/checkpoints
"""

import sys
from functools import cache
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.errors import UserError


def main() -> None:
    """Remove the old checkpoints of the run that the command line names.

    Raises:
        UserError: The folder holds no intact checkpoint, or some old checkpoint cannot be removed. All other old
            checkpoints are removed nevertheless.
    """
    parser = command_parser(__doc__)
    add_option(parser, "--load DIR", "folder of Megatron checkpoints", Path, required=True)
    keep = "number of checkpoints to keep"
    add_option(parser, "--keep-last-checkpoints K", keep, ranges.COUNT, default=1)
    retain = "also keep the checkpoints at multiples of this iteration (default: none)"
    add_option(parser, "--save-retain-interval N", retain, ranges.COUNT)
    dry_run = "only print which checkpoints would be removed"
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    arguments = parser.parse_args()

    # Reading checkpoints needs torch and Megatron, `--help` does not.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from tqdm import tqdm

    from maskmoe.checkpoint.integrity import check_content, check_structure
    from maskmoe.checkpoint.series import choose_checkpoint, remove_old_checkpoints

    keep, retain_interval = arguments.keep_last_checkpoints, arguments.save_retain_interval
    with tqdm(unit="checkpoint", leave=False, delay=1) as progress:  # no bar if there is nothing to verify

        @cache  # the checkpoint that is chosen is also the first one that is kept
        def check(checkpoint: Path) -> None:
            progress.set_description(f"verifying {checkpoint.name}")
            check_structure(checkpoint)
            check_content(checkpoint)
            progress.update()

        choice = choose_checkpoint(arguments.load, check=check)
        if choice.checkpoint is None:
            raise UserError(f"--load {arguments.load} holds no checkpoint")
        old = remove_old_checkpoints(arguments.load, keep, retain_interval, choice.iteration, arguments.dry_run, check)
    for fault in choice.rejected:
        print(f"warning: {fault}; it stays", file=sys.stderr)
    remaining = [] if arguments.dry_run else [checkpoint for checkpoint in old if checkpoint.exists()]
    for checkpoint in old:
        if checkpoint not in remaining:
            print(f"{'would remove' if arguments.dry_run else 'removed'}  {checkpoint}")
    if remaining:
        raise UserError(f"cannot remove all files of {remaining[0]}; look at who may write there, and try again")
