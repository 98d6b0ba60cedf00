"""Tensors that autograd keeps for the backward pass."""

from collections.abc import Callable

import torch
from torch import Tensor


def saved_tensors(forward: Callable[[], object]) -> list[Tensor]:
    """Run a forward pass and return the tensors that it saves; views share memory with other tensors."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return saved
