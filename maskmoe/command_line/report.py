"""Write the page report.html of a training run: loss, speed, load of the experts and settings."""

from pathlib import Path

from maskmoe.command_line.arguments import inputs_of_run
from maskmoe.command_line.parser import Parser, add_force_argument
from maskmoe.errors import UserError
from maskmoe.files.outputs import check_outputs
from maskmoe.files.paths import check_folder


def main() -> None:
    """Write the page from TensorBoard's event files of the run or, without event files, from its logs.

    Raises:
        UserError: the folder does not exist, or the run has logged nothing.
    """
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, whose folder `tensorboard` holds the event files")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="folder of the event files, if it is another one")
    add("--output", type=Path, metavar="FILE", help="the page (default: report.html in the run folder)")
    add_force_argument(parser)
    arguments = parser.parse_args()
    check_folder(arguments.run)
    if arguments.tensorboard_dir is not None:
        check_folder(arguments.tensorboard_dir, "--tensorboard-dir")
    if arguments.output is not None:
        check_outputs([arguments.output], inputs_of_run(arguments.run, arguments.tensorboard_dir), arguments.force)

    # Only now, since these imports take time and `--help` does not need them.
    from maskmoe.processes.folder_lock import look_at_lock
    from maskmoe.run_report.page import REPORT, write_page
    from maskmoe.run_report.sources import read_run
    from maskmoe.run_status.checkpoints import find_checkpoints

    history = read_run(arguments.run, arguments.tensorboard_dir)
    if not history.series:
        raise UserError(
            f"{arguments.run} holds neither TensorBoard's event files nor logs of a training: pass --tensorboard-dir"
        )
    path = arguments.output or arguments.run / REPORT
    # A run holds a lock in the folder of its checkpoints. Without such a folder, it is unknown whether the run trains.
    folder = find_checkpoints(arguments.run, history.texts)
    lock = None if folder is None else look_at_lock(folder)
    is_running = None if folder is None else lock is not None and lock.is_alive
    write_page(history, arguments.run.resolve().name, path, is_running)
    print(f"written {path}")
