"""Writes the values of a run to TensorBoard and Weights & Biases."""

import os
import shlex
import sys
import uuid
from argparse import Namespace
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from megatron.training import get_tensorboard_writer, get_wandb_writer

import maskmoe
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import TEXT_TAG, run_folder
from maskmoe.training.watch.callback import Callback

_ENTRY_POINT = "maskmoe.training.pretrain"


def log_facts(facts: Mapping[str, str]) -> None:
    """Write settings of the run to TensorBoard, as texts; on the last rank only."""
    if writer := get_tensorboard_writer():
        for name, text in facts.items():
            writer.add_text(TEXT_TAG + name, text)


def own_program() -> str:
    """Return the file of `--program`, which runs as this process instead of MaskMoE's entry point; empty without it."""
    spec = sys.modules["__main__"].__spec__
    return "" if spec is not None and spec.name == _ENTRY_POINT else str(Path(sys.argv[0]).resolve())


class EventFiles(Callback):
    """Logs the command of the run, and writes the last values at its end."""

    def on_start(self) -> None:
        """Log the command; Megatron has opened the writer, on the last rank only."""
        nodes, processes = (os.environ.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        ranks = f"--nnodes {nodes} --nproc-per-node {processes}"
        program = own_program()
        entry = (program, "pretrain") if program else ("-m", _ENTRY_POINT)
        packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
        command = f"torchrun {ranks} {shlex.join([*entry, *sys.argv[1:]])}"
        log_facts({"command": command, "versions": f"maskmoe {maskmoe.__version__}, {packages}"})

    def on_end(self, error: BaseException | None) -> None:
        """Write the last values."""
        if writer := get_tensorboard_writer():
            writer.flush()


def log_scalars(scalars: Mapping[str, float], iteration: int) -> None:
    """Write scalars by tag to the writers that Megatron has opened, which are on the last rank."""
    if writer := get_tensorboard_writer():
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, iteration)
    if wandb_writer := get_wandb_writer():
        wandb_writer.log(dict(scalars), iteration)


RUN_ID = "wandb_run_id"
"""The file of the run folder with the id of the run at Weights & Biases."""


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
