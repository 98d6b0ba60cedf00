"""Sources of tensors in memory, and sources that change or join other sources."""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSource, TensorSpec
from maskmoe.errors import UserError


class MemorySource:
    """Provides tensors that are in memory.

    Args:
        tensors: the tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._values = tensors
        self.tensors = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._values[block.tensor][block.slices]


class ZeroSource:
    """Provides tensors of zeros.

    Args:
        tensors: shapes and dtypes of the tensors by name.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        self.tensors = tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return torch.zeros(block.sizes, dtype=self.tensors[block.tensor].dtype)


class RenamedSource:
    """Replaces the prefix of all names of another source.

    Args:
        source: provides the elements.
        old_prefix: the prefix that all names of `source` have.
        new_prefix: the prefix that replaces `old_prefix`.
    """

    def __init__(self, source: TensorSource, old_prefix: str, new_prefix: str) -> None:
        self._source = source
        self._old_prefix = old_prefix
        self._new_prefix = new_prefix
        self.tensors = {new_prefix + name.removeprefix(old_prefix): spec for name, spec in source.tensors.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        name = self._old_prefix + block.tensor.removeprefix(self._new_prefix)
        return self._source.read(Block(name, block.offsets, block.sizes))


class JoinedSource:
    """Joins the tensors of several sources.

    Args:
        sources: the sources; if several have a tensor of one name, the first of them provides the tensor.
    """

    def __init__(self, *sources: TensorSource) -> None:
        self._source_of = {name: source for source in reversed(sources) for name in source.tensors}
        self.tensors = {name: source.tensors[name] for name, source in self._source_of.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._source_of[block.tensor].read(block)


class CastSource:
    """Casts the floating point tensors of another source.

    Args:
        source: provides the elements.
        dtype: the dtype of all floating point tensors except `kept`.
        kept: names of tensors that keep their dtype.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype, kept: frozenset[str] = frozenset()) -> None:
        self._source = source
        self.tensors = {
            name: TensorSpec(spec.shape, dtype) if spec.dtype.is_floating_point and name not in kept else spec
            for name, spec in source.tensors.items()
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._source.read(block).to(self.tensors[block.tensor].dtype)


class FiniteSource:
    """Refuses to read NaN and infinite values from another source.

    Args:
        source: provides the elements.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.tensors = source.tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`.

        Raises:
            UserError: an element of the block is NaN or infinite.
        """
        elements = self._source.read(block)
        if elements.is_floating_point() and elements.numel() and not all(map(torch.isfinite, elements.aminmax())):
            raise UserError(f"{block.tensor} holds NaN or infinite values; pass --allow-nan to convert it nevertheless")
        return elements
