"""Writes the values and warnings of a run to TensorBoard, Weights & Biases and the journal."""

import os
import shlex
import sys
import uuid
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron.training import get_tensorboard_writer, get_wandb_writer

import maskmoe
from maskmoe.files.outputs import write_text
from maskmoe.files.run_folder import TENSORBOARD, TEXT_TAG, Fact, Journal, Kind, run_folder
from maskmoe.processes.console import console
from maskmoe.training.watch.callback import Callback

_ENTRY_POINT = "maskmoe.training.pretrain"


def choose_event_folder(args: Namespace) -> None:
    """Choose the folder `tensorboard` of the run folder for event files if the run needs them and has no other folder.

    The page is made from the event files, and Megatron logs losses to Weights & Biases only beside event files.
    """
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is not None and (args.report or args.wandb_project) and args.tensorboard_dir is None:
        args.tensorboard_dir = str(folder / TENSORBOARD)


def log_facts(facts: Mapping[str, str]) -> None:
    """Write settings of the run to TensorBoard, from where they get into the page; on the last rank only."""
    if writer := get_tensorboard_writer():
        for name, text in facts.items():
            writer.add_text(TEXT_TAG + name, text)


def own_program() -> str:
    """Return the file of `--program`, which runs as this process instead of MaskMoE's entry point; empty without it."""
    spec = sys.modules["__main__"].__spec__
    return "" if spec is not None and spec.name == _ENTRY_POINT else str(Path(sys.argv[0]).resolve())


class EventFiles(Callback):
    """Logs the command of the run, lets errors of the disk not end the run, and writes the last values at its end."""

    def on_start(self) -> None:
        """Log the command; Megatron has opened the writer, on the last rank only."""
        if writer := get_tensorboard_writer():
            tolerate_write_errors(writer)
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


def tolerate_write_errors(writer: Any) -> None:
    """Let torch's `SummaryWriter` warn when a disk is full, and drop the values: training continues without them."""
    events = writer._get_file_writer().event_writer

    def tolerating(call: Callable[..., None]) -> Callable[..., None]:
        def tolerant(*arguments: object) -> None:
            try:
                call(*arguments)
            except OSError as error:
                events.add_event = events.flush = lambda *_: None
                with suppress(OSError):  # stderr may be a file on the same disk
                    print(f"warning: TensorBoard's events end here: {error}", file=sys.stderr, flush=True)

        return tolerant

    events.add_event, events.flush = tolerating(events.add_event), tolerating(events.flush)


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


def warn(journal: Journal, text: str, iteration: int, **facts: Fact) -> None:
    """Print a warning on one line and write it to the journal; to be called on the last rank only, which logs."""
    console.say(f"warning: {text}", rank=-1)
    journal.write(Kind.WARNED, text, iteration, **facts)
