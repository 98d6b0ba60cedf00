"""The tables of Megatron-Core's hash layers in a checkpoint."""

from pathlib import Path

import numpy as np

from maskmoe.checkpoint.reading import read_tensors
from maskmoe.checkpoint.series import locate_checkpoint
from maskmoe.errors import UserError
from maskmoe.routing_mask.expert_table import TENSOR_NAMES, layer_of_tensor


def read_expert_tables(source: Path) -> dict[str, np.ndarray]:
    """Read the tables of Megatron-Core's hash layers from a checkpoint, or from the newest intact one of a run.

    Returns:
        The tables, int32 [vocab, k], by the names of their tensors.

    Raises:
        UserError: The source is missing or damaged, or holds no such table.
    """
    checkpoint = locate_checkpoint(source)
    tables = read_tensors(checkpoint, lambda name: layer_of_tensor(name) is not None)
    if not tables:
        raise UserError(f"{checkpoint} holds no expert table: no tensor is named as {TENSOR_NAMES['tid2eid']}")
    return {name: table.numpy() for name, table in tables.items()}
