"""Lets a run continue its Weights & Biases run when it resumes; Megatron's `--wandb-…` flags do the logging."""

import os
import uuid
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.run_folder import run_folder

RUN_ID = "wandb_run_id"
"""The file of the run folder with the id of the run at Weights & Biases."""


def wandb_defaults(args: Namespace) -> dict[str, Any]:
    """Return the values of Megatron's flags that `--wandb-project` sets by default; empty without the flag.

    By default, the run has the name of the run folder, and its files are in `wandb` there.

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
    # Megatron would use the folder of the checkpoints, in which only checkpoints belong.
    defaults = {"wandb_exp_name": folder.name, "wandb_save_dir": str(folder)}
    return {name: value for name, value in defaults.items() if getattr(args, name) is None}


def take_run_id(args: Namespace) -> None:
    """Let the last rank, which logs to Weights & Biases, continue the run whose id is in the run folder.

    Without an id in the folder, the rank makes one. Nothing is done without `--wandb-project`, or if `WANDB_RUN_ID` is
    set.
    """
    folder = run_folder(args.save, args.tensorboard_dir)
    is_logging = getattr(args, "wandb_project", None) and args.rank == args.world_size - 1
    if folder is not None and is_logging and not os.environ.get("WANDB_RUN_ID"):
        path = folder / RUN_ID
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_output(path) as unfinished:
                unfinished.write_text(uuid.uuid4().hex[:12] + "\n")
        os.environ["WANDB_RUN_ID"] = path.read_text().strip()
        os.environ.setdefault("WANDB_RESUME", "allow")
