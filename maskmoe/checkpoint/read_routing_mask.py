"""The routing mask as tensors of a checkpoint, and the mask of a run, read from a mask file or a checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskmoe.checkpoint.reading import read_checkpoint_layout, read_tensors
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask, row_dtype

CHECKPOINT_PREFIX = "routing_mask."
"""The name of the mask's module inside the model, hence the prefix of the mask's tensors in every checkpoint."""

BUFFERS = ("row_of_id", "visible_bits", "metadata")
"""The names of the mask's tensors, which are the buffers of `VisibleExperts`."""


def buffers_of_routing_mask(mask: RoutingMask) -> dict[str, Tensor]:
    """Convert a routing mask to tensors, by the names of the buffers of `VisibleExperts`.

    Returns:
        `row_of_id` [tables, vocab], `visible_bits` [tables, rows, bytes], and `metadata`, JSON text as uint8 [bytes].
    """
    tensors, metadata = mask.to_tensors()
    buffers = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return buffers | {"metadata": torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)}


def routing_mask_from_buffers(buffers: dict[str, Tensor]) -> RoutingMask:
    """Convert the buffers of `VisibleExperts` to a routing mask; raise `UserError` if they are damaged or altered.

    Rows may be int32, as in transformers' format, although the mask stores them as int16.
    """
    metadata: Any = None
    try:
        arrays = {name: buffer.cpu().numpy() for name, buffer in buffers.items()}
        metadata = json.loads(arrays.pop("metadata").tobytes())
        if arrays["row_of_id"].dtype == np.int32:
            arrays["row_of_id"] = arrays["row_of_id"].astype(row_dtype(arrays["visible_bits"].shape[1]))
    except (LookupError, TypeError, ValueError, RecursionError):  # `from_tensors` below refuses missing metadata.
        arrays = {}
    return RoutingMask.from_tensors(arrays, metadata, source="the checkpoint's routing mask")


def read_routing_mask(source: str | Path) -> RoutingMask:
    """Read a routing mask from a mask file, a checkpoint, or the newest intact checkpoint in the folder of a run.

    Raises:
        UserError: The source is missing or damaged, or a checkpoint holds no routing mask.
    """
    if not Path(source).is_dir():
        return RoutingMask.load(source)
    checkpoint = locate_checkpoint(Path(source))
    mask = mask_in_checkpoint(checkpoint)
    if mask is None:
        raise UserError(
            f"{checkpoint} holds no routing mask: it is not a checkpoint of MaskMoE; training can continue it with "
            "--routing-mask and --change-routing-mask"
        )
    return mask


def mask_in_checkpoint(checkpoint: Path) -> RoutingMask | None:
    """Read the mask of a checkpoint; None if the checkpoint holds none. Raises UserError if it is damaged."""
    buffers = read_tensors(checkpoint, lambda name: name.startswith(CHECKPOINT_PREFIX))
    if not buffers:
        return None
    return routing_mask_from_buffers({name.removeprefix(CHECKPOINT_PREFIX): buffer for name, buffer in buffers.items()})


def has_expert_tables(checkpoint: Path) -> bool:
    """Return whether a checkpoint has a table of experts, as Megatron-Core's hash layers have. Raises UserError."""
    return any(name.endswith(".tid2eid") for name in read_checkpoint_layout(checkpoint).state_dict_metadata)
