"""Makes run folders as the status reads them, without a training."""

import pickle
import time

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.utils.tensorboard import SummaryWriter

from maskmoe.checkpoint.integrity import Manifest, digest_and_size
from maskmoe.checkpoint.reading import LAYOUT_FILE

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
        names = (LAYOUT_FILE, "__0_0.distcp")
        Manifest.of({name: digest_and_size(checkpoint / name) for name in names}).save(checkpoint)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint
