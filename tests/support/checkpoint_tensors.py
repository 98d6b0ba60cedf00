"""Reads and compares the tensors of checkpoints in `torch_dist` format."""

from pathlib import Path

import torch
from torch import Tensor

from maskmoe.conversion.megatron_models import TorchDistSource
from maskmoe.conversion.tensor_sources import Block


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, except the optimizer's."""
    source = TorchDistSource(checkpoint)
    return {
        name: source.read(Block.whole(name, spec.shape))
        for name, spec in source.tensors.items()
        if not name.startswith("optimizer.")
    }


def assert_same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Check that tensors have equal names, types and values."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)
