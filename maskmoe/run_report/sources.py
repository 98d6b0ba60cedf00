"""Finds what a run has logged: TensorBoard's event files, or else the logs of the training."""

from pathlib import Path

from maskmoe.launch.run_folder import TENSORBOARD
from maskmoe.run_report.events import EventHistory, event_files
from maskmoe.run_report.history import History
from maskmoe.run_report.logs import log_files, read_logs


def find_event_folder(run: Path) -> Path | None:
    """Return the folder of a run's event files; None if there are none."""
    return next((folder for folder in (run / TENSORBOARD, run) if event_files(folder)), None)


def read_run(run: Path, event_folder: Path | None = None) -> History:
    """Return what a run has logged; an empty history if nothing is found.

    Args:
        run: the run folder.
        event_folder: the folder of the event files, if it is known.

    Raises:
        OSError: a file cannot be read.
    """
    folder = event_folder or find_event_folder(run)
    return read_logs(log_files(run)) if folder is None else EventHistory(folder).update()
