"""Data for, logs of, and folders of training runs that tests of several folders start, or only seem to start."""

import pickle
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from support.datasets import build_mask, count_ids, frequent_ids, write_documents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.utils.tensorboard import SummaryWriter

from maskmoe.checkpoint.integrity import Manifest
from maskmoe.checkpoint.reading import LAYOUT_FILE
from maskmoe.data.dataset_writing import optimal_dtype

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


NUM_LAYERS = 3


def write_arguments(folder, text="", **values):
    """Write the arguments of a run's newest start."""
    folder.mkdir(exist_ok=True)
    values = {"train_iters": 40, "seq_length": 32, **values}
    lines = ["train-iters: '40'", *(f"# {name}: {value}" for name, value in values.items())]
    (folder / "args.yaml").write_text("\n".join([text, *lines]) + "\n")


def write_events(folder, first=1, last=20, start=None):
    """Write the event file of one start of a run, with an iteration every 0.25 s.

    Args:
        folder: the folder of the event files.
        first: the first iteration.
        last: the last iteration.
        start: when the start began, in seconds since 1970, by which the files are ordered; None if it ended just now.
    """
    start = time.time() - 0.25 * (last - first + 1) if start is None else start
    writer = SummaryWriter(folder / "new")
    writer.add_text("maskmoe/command", 'pretrain --lr "1e-3" <b>', first - 1)

    def add(tag, value, step):
        writer.add_scalar(tag, value, step, walltime=start + 0.25 * (step - first))

    for step in range(first, last + 1):
        add("lm loss", 5 / step, step)
        writer.add_scalar("lm loss vs samples", 5 / step, 16 * step)
        add("batch-size", 16, step)
        if step % 5 == 0:
            add("lm loss validation", 6 / step, step)
        for layer in range(NUM_LAYERS):
            add(f"moe/expert_load_max_over_mean_layer_{layer}", 1 + layer + step / 100, step)
            add(f"moe/rank_load_max_over_mean_layer_{layer}", 1 + layer / 10, step)
    writer.close()
    (new,) = (folder / "new").iterdir()
    new.rename(folder / f"events.out.tfevents.{start:010.0f}.host")
    (folder / "new").rmdir()


def write_checkpoint(folder, iteration, with_manifest=True):
    """Write a checkpoint of one small file; without its digests if wanted."""
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    layout = Metadata({}, storage_data={MetadataIndex("object"): _StorageInfo("__0_0.distcp", 0, 1000)})
    (checkpoint / LAYOUT_FILE).write_bytes(pickle.dumps(layout))
    (checkpoint / "__0_0.distcp").write_bytes(bytes(1000))
    if with_manifest:
        Manifest.of_files(checkpoint, [LAYOUT_FILE, "__0_0.distcp"]).save(checkpoint)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint
