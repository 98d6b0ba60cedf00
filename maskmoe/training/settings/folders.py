"""The defaults of Megatron's flags that depend on the folder of the run."""

from argparse import Namespace
from typing import Any

from maskmoe.errors import UserError
from maskmoe.files.run_folder import TENSORBOARD, run_folder


def run_folder_defaults(args: Namespace) -> dict[str, Any]:
    """Return the values of Megatron's flags that the run folder sets by default.

    Event files of TensorBoard are in `tensorboard` of the run folder. A run of Weights & Biases has the name of the run
    folder, and its files are in `wandb` there. Raises `UserError` if a run with `--wandb-project` has no folder.
    """
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is None:
        if args.wandb_project:
            raise UserError("--wandb-project needs a run folder: pass --save or --tensorboard-dir")
        return {}
    defaults = {"tensorboard_dir": str(folder / TENSORBOARD)}
    if args.wandb_project:
        # Megatron would use the folder of the checkpoints, in which only checkpoints belong.
        defaults |= {"wandb_exp_name": folder.name, "wandb_save_dir": str(folder)}
    return {name: value for name, value in defaults.items() if getattr(args, name) is None}
