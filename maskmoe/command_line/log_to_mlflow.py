"""Copy what a training run has logged to MLflow, during the run or later."""

import sys
import time
from importlib.util import find_spec
from pathlib import Path

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Parser
from maskmoe.errors import UserError
from maskmoe.files.paths import check_folder


def main() -> None:
    """Copy the scalars and arguments in TensorBoard's event files to the MLflow run of the run folder.

    Raises:
        UserError: MLflow is not installed, the folder holds no event files, or MLflow cannot be reached.
    """
    parser = Parser(
        description=f"{__doc__} The run folder keeps the id of the MLflow run, so a second call adds what is new."
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="run folder, whose folder `tensorboard` holds the event files")
    add("--tensorboard-dir", type=Path, metavar="DIR", help="folder of the event files, if it is another one")
    add("--tracking-uri", metavar="URI", help="MLflow's server or file (default: MLFLOW_TRACKING_URI)")
    add("--experiment", metavar="NAME", default="maskmoe", help="MLflow's experiment (default: maskmoe)")
    add("--follow", type=ranges.PAUSE, metavar="SECONDS", help="copy again after this time, until Ctrl-C")
    arguments = parser.parse_args()
    check_folder(arguments.run)
    if arguments.tensorboard_dir is not None:
        check_folder(arguments.tensorboard_dir, "--tensorboard-dir")

    # Only now, since these imports take seconds and `--help` does not need them.
    from maskmoe.run_report.events import EventFolder
    from maskmoe.run_report.sources import find_event_folder

    folder = arguments.tensorboard_dir or find_event_folder(arguments.run)
    if folder is None:
        raise UserError(f"{arguments.run} holds no event files of TensorBoard: pass --tensorboard-dir")
    if find_spec("mlflow") is None:
        raise UserError("this command needs the package mlflow: pip install mlflow")
    from mlflow import MlflowClient  # pyrefly: ignore[missing-import]
    from mlflow.exceptions import MlflowException  # pyrefly: ignore[missing-import]

    from maskmoe.run_report.mlflow_copy import MlflowCopy

    try:
        copy = MlflowCopy(
            MlflowClient(arguments.tracking_uri), arguments.run, EventFolder(folder), arguments.experiment
        )
        print(f"{copy.update():,} values copied to MLflow's run {copy.run_id}", flush=True)
    except MlflowException as error:
        raise UserError(f"MLflow: {' '.join(str(error).split())}") from error
    while arguments.follow is not None:
        time.sleep(arguments.follow)
        try:
            copy.update()
        except MlflowException as error:
            print(f"warning: MLflow: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
