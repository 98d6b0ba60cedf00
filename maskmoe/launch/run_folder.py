"""Finds the folder of a run, in which a rank writes everything but its checkpoints."""

import os
from pathlib import Path

RUN_FOLDER_VARIABLE = "MASKMOE_RUN_DIR"
"""The environment variable with which a launcher names the run folder to the ranks."""

ARGUMENTS = "args.yaml"
"""The file of a run folder with the arguments of the newest start, a model file."""

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
"""The folders of the checkpoints and of TensorBoard's event files in a run folder."""


def run_folder(save: str | None, tensorboard_dir: str | None = None) -> Path | None:
    """Return the folder of a run: the launcher's, or the folder that contains `--save` or else `--tensorboard-dir`.

    The launcher calls these folders `checkpoints` and `tensorboard`. A folder with another name is itself the run
    folder. Without a launcher and both folders, there is no run folder.

    Args:
        save: the value of `--save`.
        tensorboard_dir: the value of `--tensorboard-dir`.
    """
    if folder := os.environ.get(RUN_FOLDER_VARIABLE):
        return Path(folder)
    for folder, name in ((save, CHECKPOINTS), (tensorboard_dir, TENSORBOARD)):
        if folder:
            path = Path(folder).absolute()
            return path.parent if path.name == name else path
    return None
