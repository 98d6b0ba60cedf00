"""Finds the routing mask of a run: in a file of its own or inside a checkpoint."""

from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint

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
        UserError: there is none.
    """
    tracker = Path(folder) / _TRACKER
    try:
        iteration = tracker.read_text().strip()
    except OSError as error:
        raise UserError(f"there is no checkpoint in {folder}: cannot read {_TRACKER} ({error.strerror})") from error
    name = iteration if iteration == "release" else f"iter_{int(iteration):07d}"
    return Path(folder) / name


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
        reader = torch_checkpoint.FileSystemReader(folder)
        stored = reader.read_metadata().state_dict_metadata
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a readable torch_dist checkpoint: {error}") from error
    buffers = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(CHECKPOINT_PREFIX)
    }
    if not buffers:
        raise UserError(f"{folder} holds no routing mask: it is not a checkpoint of MaskMoE")
    torch_checkpoint.load(buffers, storage_reader=reader, no_dist=True)
    return routing_mask_from_buffers({name.removeprefix(CHECKPOINT_PREFIX): b for name, b in buffers.items()})
