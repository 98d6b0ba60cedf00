"""TensorBoard's event files of a run: their folder, what MaskMoE adds to them, and errors of the disk."""

import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from megatron.training import get_tensorboard_writer

import maskmoe
from maskmoe.files.run_folder import TENSORBOARD, TEXT_TAG, run_folder
from maskmoe.training.watch.callback import Callback


def choose_event_folder(args: Namespace) -> None:
    """Choose the folder `tensorboard` of the run folder for event files if the run has a page and no other folder."""
    folder = run_folder(args.save, args.tensorboard_dir)
    if folder is not None and args.report and args.tensorboard_dir is None:
        args.tensorboard_dir = str(folder / TENSORBOARD)


def log_facts(facts: Mapping[str, str]) -> None:
    """Write settings of the run to TensorBoard, from where they get into the page; on the last rank only."""
    if writer := get_tensorboard_writer():
        for name, text in facts.items():
            writer.add_text(TEXT_TAG + name, text)


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


class EventFiles(Callback):
    """Logs the command of the run, lets errors of the disk not end the run, and writes the last values at its end."""

    def on_start(self) -> None:
        """Log the command; Megatron has opened the writer, on the last rank only."""
        if writer := get_tensorboard_writer():
            tolerate_write_errors(writer)
        log_command()

    def on_end(self, error: BaseException | None) -> None:
        """Write the last values."""
        if writer := get_tensorboard_writer():
            writer.flush()


def tolerate_write_errors(writer: Any) -> None:
    """Let a writer of event files warn when a disk is full, and drop the values: training continues without them.

    Args:
        writer: torch's `SummaryWriter`.
    """
    events = writer._get_file_writer().event_writer

    def tolerating(call: Callable[..., None]) -> Callable[..., None]:
        def tolerant(*arguments: object) -> None:
            try:
                call(*arguments)
            except OSError as error:
                print(f"warning: TensorBoard's events end here: {error}", file=sys.stderr, flush=True)
                events.add_event = events.flush = lambda *_: None

        return tolerant

    events.add_event, events.flush = tolerating(events.add_event), tolerating(events.flush)
