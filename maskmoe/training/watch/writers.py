"""Writes the values of a run to TensorBoard and Weights & Biases."""

import os
import uuid
from argparse import Namespace
from collections.abc import Mapping

from megatron.training import get_tensorboard_writer, get_wandb_writer

from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import run_folder

RUN_ID = "wandb_run_id"  # the file of the run folder with the id of the run at Weights & Biases


def log_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write scalars by tag to the writers that Megatron has opened, which are on the last rank."""
    if writer := get_tensorboard_writer():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(dict(scalars), iteration)


def flush_event_files() -> None:
    """Write the last values to TensorBoard's event files, which a rank that exits early would lose."""
    if writer := get_tensorboard_writer():
        writer.flush()


def take_run_id(args: Namespace) -> None:
    """Let the last rank, which logs to Weights & Biases, continue the run whose id is in the run folder, or make an id.

    Nothing is done without `--wandb-project`, or if `WANDB_RUN_ID` is set.
    """
    folder = run_folder(args.save, args.tensorboard_dir)
    is_logging = getattr(args, "wandb_project", None) and args.rank == args.world_size - 1
    if folder is not None and is_logging and not os.environ.get("WANDB_RUN_ID"):
        path = folder / RUN_ID
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, uuid.uuid4().hex[:12] + "\n")
        os.environ["WANDB_RUN_ID"] = path.read_text().strip()
        os.environ.setdefault("WANDB_RESUME", "allow")
