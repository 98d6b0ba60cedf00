"""Data for, and logs of, training runs that tests of several folders start."""

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from support.datasets import build_mask, count_ids, frequent_ids, write_documents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from torch.utils.tensorboard import SummaryWriter

from maskmoe.data.indexed_dataset import optimal_dtype

LAPTOP_VOCAB_SIZE = 4095  # NullTokenizer adds one id.


def read_scalars(run_folder: Path, keep_repeated: bool = False) -> dict[str, list[ScalarEvent]]:
    """Return the scalars that a run and all its restarts logged, by name, with the precision of fp32.

    Args:
        run_folder: Folder of the run, with TensorBoard's events in `tensorboard`.
        keep_repeated: Return all values of an iteration that was logged more than once, instead of the last value.
    """
    events = EventAccumulator(
        str(run_folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=not keep_repeated
    )
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()["scalars"]}


def read_losses(run_folder: Path) -> dict[int, float]:
    """Return the training loss of each logged iteration; empty if none was logged."""
    return {event.step: event.value for event in read_scalars(run_folder).get("lm loss", ())}


def free_port() -> int:
    """Return a TCP port that is free now.

    Another process may take the port before it is used. So use this function only if a program under test wants a port
    on its command line; `support.launchers.start_ranks` needs none.
    """
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def make_laptop_data(folder: Path, num_documents: int) -> str:
    """Write random data and a routing mask for launch/models/laptop.yaml, and return the flags that name both."""
    documents = frequent_ids(np.random.default_rng(0), LAPTOP_VOCAB_SIZE, num_documents)
    write_documents(folder / "data", documents, optimal_dtype(LAPTOP_VOCAB_SIZE))
    frequency = count_ids(folder / "data", LAPTOP_VOCAB_SIZE)
    build_mask(frequency, num_experts=8, num_layers=4).save(folder / "mask.safetensors")
    return (
        f"--data-path {folder}/data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {LAPTOP_VOCAB_SIZE} "
        f"--routing-mask {folder}/mask.safetensors"
    )


def write_scalars(
    folder: Path, scalars: Mapping[str, Sequence[tuple[int, float]]], start: float = 0.0, seconds: float = 1.0
) -> None:
    """Write a file of scalars.

    Args:
        folder: Folder of event files, which is made.
        scalars: Steps and values by tag.
        start: Wall time before the first step.
        seconds: Duration of a step.
    """
    with SummaryWriter(folder) as writer:
        for tag, points in scalars.items():
            for step, value in points:
                writer.add_scalar(tag, value, step, walltime=start + step * seconds)
