"""TensorBoard's event files of a run: their folder, what MaskMoE adds to them, and their last values."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from megatron.training import get_tensorboard_writer

import maskmoe
from maskmoe.launch.run_folder import TENSORBOARD, run_folder
from maskmoe.run_status.scalars import OWN_TEXT


def choose_event_folder(args: Namespace) -> None:
    """Choose the folder `tensorboard` of the run folder for event files if the run has a page and no other folder."""
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is not None and args.report and args.tensorboard_dir is None:
        args.tensorboard_dir = str(folder / TENSORBOARD)


def log_facts(facts: Mapping[str, str]) -> None:
    """Write settings of the run to TensorBoard, from where they get into the page; on the last rank only."""
    if writer := get_tensorboard_writer():
        for name, text in facts.items():
            writer.add_text(OWN_TEXT + name, text)


def log_command() -> None:
    """Write the command that starts the ranks of the run again, and the versions of the packages, to TensorBoard."""
    nodes, processes = (os.environ.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    ranks = f"--nnodes {nodes} --nproc-per-node {processes}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "torch"))
    log_facts(
        {
            "command": f"torchrun {ranks} -m maskmoe.training.pretrain {shlex.join(sys.argv[1:])}",
            "versions": f"maskmoe {maskmoe.__version__}, {packages}",
        }
    )


@contextmanager
def flushing_events() -> Iterator[None]:
    """Write the last values to the event files when the block ends: Megatron leaves them in memory."""
    try:
        yield
    finally:
        if writer := get_tensorboard_writer():
            writer.flush()
