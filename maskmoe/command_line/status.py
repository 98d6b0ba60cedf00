"""Show the status of a running or ended training run from its run folder alone.

The status has progress and ETA, losses and tokens per second, the starts and how they ended, warnings, changes of the
nodes, and the checkpoints: whether they are sound, and which one a restart would load. The run is not disturbed: this
command only reads.

Example:
  %(prog)s runs/laptop --html laptop.html
"""

import json
from collections.abc import Iterable
from pathlib import Path

from maskmoe.arguments.parser import add_force_argument, command_parser
from maskmoe.errors import UserError
from maskmoe.files.outputs import check_outputs, lies_inside, write_text
from maskmoe.files.paths import check_folder

_REPLACEABLE = ("report.html", "status.html", "status.json")  # the only files of a run folder that --force replaces


def main() -> None:
    """Show or write the status of the run that the command line names.

    Raises:
        UserError: The folder is no run folder, or an output cannot be written.
    """
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, of a run that works or has ended")
    add("--html", type=Path, metavar="FILE", help="also write the status as an HTML page, with plots of the scalars")
    add("--json", type=Path, metavar="FILE", help="also write the status as JSON")
    meaning = "compare all files of the checkpoints with their digests, which reads all of their bytes"
    add("--verify", action="store_true", help=meaning)
    add_force_argument(parser)
    arguments = parser.parse_args()
    check_folder(arguments.run)
    outputs = [path for path in (arguments.html, arguments.json) if path is not None]
    check_outputs(outputs, [], arguments.force)

    # Only now, since these imports take time and `--help` does not need them.
    from maskmoe.run_status.report import render_text, write_page
    from maskmoe.run_status.status import RunArguments, read_status

    of_run = RunArguments.read(arguments.run)
    folders = (of_run.path("save"), of_run.path("tensorboard_dir"))
    _check_is_no_file_of_run(outputs, arguments.run, [folder for folder in folders if folder is not None])
    status = read_status(arguments.run, arguments.verify)
    if arguments.html is not None:
        write_page(status, arguments.html)
    if arguments.json is not None:
        write_text(arguments.json, f"{json.dumps(status.to_json())}\n")
    print(render_text(status), end="")  # last, since nobody may read it: `| head`


def _check_is_no_file_of_run(outputs: Iterable[Path], run: Path, folders: Iterable[Path]) -> None:
    """Check that no output replaces a file of a run, or lies in a folder that the run fills.

    Args:
        outputs: The files that will be written.
        run: The run folder.
        folders: Folders of the run elsewhere.

    Raises:
        UserError: Names the output.
    """
    for path in outputs:
        # Only the run folder itself takes pages: all folders in it are the run's, such as its checkpoints.
        is_beside = path.resolve().parent == run.resolve()
        is_in_folder = any(lies_inside(path, folder) for folder in (run, *folders))
        if (is_in_folder and not is_beside) or (is_beside and path.exists() and path.name not in _REPLACEABLE):
            raise UserError(f"cannot write {path}: it belongs to the run; name a new file elsewhere")
