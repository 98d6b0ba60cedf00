"""Finds the routing mask of a run: in a file of its own or inside a checkpoint."""

from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import CHECKPOINT_PREFIX, routing_mask_from_buffers

_TRACKER = "latest_checkpointed_iteration.txt"


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a run has saved a checkpoint under `folder` (Megatron's `--save`)."""
    return (Path(folder) / _TRACKER).is_file()


def latest_checkpoint(folder: str | Path) -> Path:
    """The folder of the newest checkpoint under `folder` (Megatron's `--save`).

    Raises:
        UserError: there is none, or the record of which it is makes no sense.
    """
    tracker = Path(folder) / _TRACKER
    try:
        iteration = tracker.read_text().strip()
    except OSError as error:
        raise UserError(f"there is no checkpoint in {folder}: cannot read {_TRACKER} ({error.strerror})") from error
    if iteration == "release":
        return Path(folder) / iteration
    if not iteration.isdecimal():
        raise UserError(f"{Path(folder) / _TRACKER} holds no iteration number: {iteration[:40]!r}")
    return Path(folder) / f"iter_{int(iteration):07d}"


def read_routing_mask(source: str | Path) -> RoutingMask:
    """Read a routing mask.

    Args:
        source: a file made by tools/build_routing_mask.py, or a folder with `torch_dist` checkpoints, of which the
            newest is read.

    Raises:
        UserError: missing, damaged, or a checkpoint without a routing mask.
    """
    source = Path(source)
    if not source.is_dir():
        return RoutingMask.load(source)
    folder = latest_checkpoint(source)
    try:
        buffers = _read_buffers(folder)
    except OSError as error:
        raise UserError(f"{folder} is not a readable torch_dist checkpoint: {error}") from error
    # Whatever torch's unpickler and zip reader meet in damaged files.
    except (Exception, CheckpointException) as error:
        raise UserError(f"{folder} is not a readable torch_dist checkpoint: its files are damaged") from error
    if not buffers:
        raise UserError(f"{folder} holds no routing mask: it is not a checkpoint of MaskMoE")
    return routing_mask_from_buffers(buffers)


def _read_buffers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The routing mask's tensors in a `torch_dist` checkpoint, by their names without prefix; empty if it has none."""
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    buffers = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(CHECKPOINT_PREFIX)
    }
    if buffers:
        torch_checkpoint.load(buffers, storage_reader=reader, no_dist=True)
    return {name.removeprefix(CHECKPOINT_PREFIX): buffer for name, buffer in buffers.items()}
