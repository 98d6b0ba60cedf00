"""Lets a run continue its Weights & Biases run when it resumes; Megatron's `--wandb-…` flags do the logging."""

import os
import uuid
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maskmoe.errors import UserError
from maskmoe.launch.run_folder import run_folder
from maskmoe.outputs import atomic_output

RUN_ID = "wandb_run_id"
"""The file of the run folder with the id of the run at Weights & Biases."""


def wandb_defaults(args: Namespace) -> dict[str, Any]:
    """Prepare the run for `--wandb-project`, and return defaults of Megatron's flags; empty without the flag.

    By default, the run has the name of the run folder, and its files are in `wandb` there. The last rank, which logs,
    takes the id of the run from the run folder, or makes an id, unless `WANDB_RUN_ID` is set.

    Raises:
        UserError: The package is not installed, or the run has no folder.
    """
    if not getattr(args, "wandb_project", None):
        return {}
    if find_spec("wandb") is None:
        raise UserError("--wandb-project needs the package wandb: pip install wandb")
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is None:
        raise UserError("--wandb-project needs a run folder: pass --save or --tensorboard-dir")
    if args.rank == args.world_size - 1 and not os.environ.get("WANDB_RUN_ID"):
        os.environ["WANDB_RUN_ID"] = _find_or_make_id(folder)
        os.environ.setdefault("WANDB_RESUME", "allow")
    # Megatron would use the folder of the checkpoints, in which only checkpoints belong.
    defaults = {"wandb_exp_name": folder.name, "wandb_save_dir": str(folder)}
    return {name: value for name, value in defaults.items() if getattr(args, name) is None}


def _find_or_make_id(folder: Path) -> str:
    path = folder / RUN_ID
    if path.exists():
        return path.read_text().strip()
    run_id = uuid.uuid4().hex[:12]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_output(path) as unfinished:
        unfinished.write_text(run_id + "\n")
    return run_id
