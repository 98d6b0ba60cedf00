"""Write the page report.html of a training run: loss, speed, load of the experts and settings."""

import argparse
from pathlib import Path

from maskmoe.errors import UserError


def main() -> None:
    """Write the page from TensorBoard's event files of the run or, without event files, from its logs.

    Raises:
        UserError: the folder does not exist, or the run has logged nothing.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, whose folder `tensorboard` holds the event files")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="folder of the event files, if it is another one")
    add("--output", type=Path, metavar="FILE", help="the page (default: report.html in the run folder)")
    arguments = parser.parse_args()
    for folder in (arguments.run, arguments.tensorboard_dir):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is not a folder: name the folder of a run")

    # Only now, since these imports take time and `--help` does not need them.
    from maskmoe.run_report.page import REPORT, write_page
    from maskmoe.run_report.sources import read_run

    history = read_run(arguments.run, arguments.tensorboard_dir)
    if not history.series:
        raise UserError(
            f"{arguments.run} holds neither TensorBoard's event files nor logs of a training: pass --tensorboard-dir"
        )
    path = arguments.output or arguments.run / REPORT
    write_page(history, arguments.run.resolve().name, path)
    print(f"written {path}")
