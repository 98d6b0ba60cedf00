"""Show how far a training run is, and which of its checkpoints are intact, from its run folder alone.

The run may work or have ended. It is not disturbed: this command only reads.

Example:
  %(prog)s runs/laptop --verify
"""

from pathlib import Path

from maskmoe.arguments.commands import command_parser
from maskmoe.files.paths import check_folder


def main() -> None:
    """Show the status of the run that the command line names. Raises UserError if the folder is no run folder."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder")
    meaning = "compare all files of the checkpoints with their digests, which reads all of their bytes"
    parser.add_argument("--verify", action="store_true", help=meaning)
    arguments = parser.parse_args()
    check_folder(arguments.run)

    # Only now, since these imports take time and `--help` does not need them.
    from maskmoe.run_status.status import status_lines

    for line in status_lines(arguments.run, arguments.verify):
        print(line, flush=True)
