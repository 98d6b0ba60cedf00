"""Tensors of checkpoints, and tensors that autograd keeps for the backward pass, with their bytes."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

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


class KeptBytes(saved_tensors_hooks):
    """A context in which autograd's saved tensors are noted, without the storages of some tensors.

    Args:
        excluded: Tensors that do not count, such as parameters.
    """

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage().data_ptr() for tensor in excluded}
        self._storages: dict[int, UntypedStorage] = {}
        super().__init__(self._note, lambda tensor: tensor)

    def __enter__(self) -> "KeptBytes":
        super().__enter__()
        return self

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._excluded:
            self._storages[storage._cdata] = storage
        return tensor

    def total(self) -> int:
        """Return the bytes that are kept now: recomputation empties storages after the forward pass has saved them."""
        return sum(storage.nbytes() for storage in self._storages.values())


def saved_tensors(forward: Callable[[], object]) -> list[Tensor]:
    """Run a forward pass and return the tensors that it saves; views share memory with other tensors."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return saved
