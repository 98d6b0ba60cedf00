"""Makes run folders as the status reads them, without a training."""

import json
import pickle

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.utils.tensorboard import SummaryWriter

from maskmoe.checkpoint.integrity import LAYOUT_FILE, FileRecord, Manifest
from maskmoe.launch.journal import FOLDER
from maskmoe.run_status.checkpoints import CheckpointReader
from maskmoe.run_status.reader import StatusReader
from maskmoe.run_status.status import Status

NUM_LAYERS = 3


def write_events(folder, first=1, last=20, **texts):
    """Write the event file of one start of a run."""
    writer = SummaryWriter(folder)
    for name, text in {"train_iters": "40", "seq_length": "32", **texts}.items():
        writer.add_text(name, text, first - 1)
    for step in range(first, last + 1):
        writer.add_scalar("lm loss", 5 / step, step)
        writer.add_scalar("lm loss vs samples", 5 / step, 16 * step)
        writer.add_scalar("batch-size", 16, step)
        writer.add_scalar("iteration-time", 0.25, step)
        if step % 5 == 0:
            writer.add_scalar("lm loss validation", 6 / step, step)
        for layer in range(NUM_LAYERS):
            writer.add_scalar(f"moe/expert_load_max_over_mean_layer_{layer}", 1 + layer + step / 100, step)
            writer.add_scalar(f"moe/rank_load_max_over_mean_layer_{layer}", 1 + layer / 10, step)
    writer.close()


def write_checkpoint(folder, iteration, with_manifest=True):
    """Write a checkpoint of one small file; without its digests if wanted."""
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    layout = Metadata({}, storage_data={MetadataIndex("object"): _StorageInfo("__0_0.distcp", 0, 1000)})
    (checkpoint / LAYOUT_FILE).write_bytes(pickle.dumps(layout))
    (checkpoint / "__0_0.distcp").write_bytes(bytes(1000))
    if with_manifest:
        names = (LAYOUT_FILE, "__0_0.distcp")
        Manifest.of({name: FileRecord.of(checkpoint / name) for name in names}).save(checkpoint)
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return checkpoint


def write_journal(folder, *entries, name="a-1"):
    """Write entries of one process: kind, time, text, iteration and facts."""
    (folder / FOLDER).mkdir(exist_ok=True)
    lines = [
        json.dumps({"kind": kind, "time": when, "text": text, "host": name[0], "iteration": iteration, "facts": facts})
        for kind, when, text, iteration, facts in entries
    ]
    (folder / FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def read_status(run, verification=None, event_folder=None) -> Status:
    """Read a status, which must need nothing that takes seconds."""

    def fail(what):
        raise AssertionError(what)

    return StatusReader(run, event_folder, CheckpointReader(fail, verification), fail).read()
