"""Finds the folder of a run, in which a rank writes everything but its checkpoints."""

import os
from pathlib import Path

RUN_FOLDER_VARIABLE = "MASKMOE_RUN_DIR"
"""The environment variable with which a launcher names the run folder to the ranks."""


def run_folder(save: str | None) -> Path | None:
    """Return the folder of a run: the launcher's, or the folder that contains `--save`; None without both.

    If `--save` is not called `checkpoints`, it is itself the run folder.

    Args:
        save: the value of `--save`.
    """
    if folder := os.environ.get(RUN_FOLDER_VARIABLE):
        return Path(folder)
    if not save:
        return None
    path = Path(save).absolute()
    return path.parent if path.name == "checkpoints" else path
