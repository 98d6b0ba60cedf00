"""The defaults of Megatron's flags that depend on the folder of the run."""

from argparse import Namespace
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.run_folder import run_folder


def wandb_defaults(args: Namespace) -> dict[str, Any]:
    """Return the values of Megatron's flags that `--wandb-project` sets by default; empty without the flag.

    By default, the run has the name of the run folder, and its files are in `wandb` there. Raises `UserError` if the
    run has no folder.
    """
    if not getattr(args, "wandb_project", None):
        return {}
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is None:
        raise UserError("--wandb-project needs a run folder: pass --save or --tensorboard-dir")
    # Megatron would use the folder of the checkpoints, in which only checkpoints belong.
    defaults = {"wandb_exp_name": folder.name, "wandb_save_dir": str(folder)}
    return {name: value for name, value in defaults.items() if getattr(args, name) is None}
