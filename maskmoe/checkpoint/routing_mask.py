"""Reads the routing mask of a run from a mask file or from a checkpoint."""

from pathlib import Path

import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from maskmoe.checkpoint.integrity import read_checkpoint_layout
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.transformer.visible_experts import CHECKPOINT_PREFIX, routing_mask_from_buffers


def read_routing_mask(source: str | Path) -> RoutingMask:
    """Read a routing mask.

    Args:
        source: a file made by `maskmoe mask`, a `torch_dist` checkpoint, or the folder of the checkpoints
            of a run. The newest sound checkpoint of a folder is read.

    Raises:
        UserError: the source is missing or damaged, or a checkpoint holds no routing mask.
    """
    source = Path(source)
    if not source.is_dir():
        return RoutingMask.load(source)
    checkpoint = locate_checkpoint(source)
    layout = read_checkpoint_layout(checkpoint)
    try:
        buffers = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in layout.state_dict_metadata.items()
            if name.startswith(CHECKPOINT_PREFIX) and isinstance(entry, TensorStorageMetadata)
        }
        if buffers:
            torch_checkpoint.load(buffers, storage_reader=torch_checkpoint.FileSystemReader(checkpoint), no_dist=True)
    # Torch's unpickler and zip reader raise exceptions of any class on damaged files.
    except (Exception, CheckpointException) as error:
        raise UserError(f"{checkpoint} is not a readable torch_dist checkpoint: its files are damaged") from error
    if not buffers:
        raise UserError(f"{checkpoint} holds no routing mask: it is not a checkpoint of MaskMoE")
    return routing_mask_from_buffers({name.removeprefix(CHECKPOINT_PREFIX): buffer for name, buffer in buffers.items()})
