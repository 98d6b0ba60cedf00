"""The names in the folder of a run."""

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

    A folder with another name than the launcher's `checkpoints` and `tensorboard` is itself the run folder.
    """
    if folder := os.environ.get(RUN_FOLDER_VARIABLE):
        return Path(folder)
    for folder, name in ((save, CHECKPOINTS), (tensorboard_dir, TENSORBOARD)):
        if folder:
            path = Path(folder).absolute()
            return path.parent if path.name == name else path
    return None
