"""Sources of tensors that are in memory, and sources made of others."""

from collections.abc import Mapping

import torch
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSource, TensorSpec
from maskmoe.errors import UserError


class MemorySource:
    """Tensors in memory.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._values = tensors
        self.tensors = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return self._values[block.tensor][block.slices]


class ZeroSource:
    """Tensors of zeros.

    Args:
        tensors: by name.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec]):
        self.tensors = tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return torch.zeros(block.sizes, dtype=self.tensors[block.tensor].dtype)


class RenamedSource:
    """Another source's tensors with another prefix to their names.

    Args:
        source: where the elements come from.
        theirs: the prefix that all its names have.
        ours: what stands in its place.
    """

    def __init__(self, source: TensorSource, theirs: str, ours: str):
        self._source = source
        self._theirs = theirs
        self._ours = ours
        self.tensors = {ours + name.removeprefix(theirs): spec for name, spec in source.tensors.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        name = self._theirs + block.tensor.removeprefix(self._ours)
        return self._source.read(Block(name, block.offsets, block.sizes))


class JoinedSource:
    """The tensors of several sources; of those with the same name, the first source's.

    Args:
        sources: to join.
    """

    def __init__(self, *sources: TensorSource):
        self._source_of = {name: source for source in reversed(sources) for name in source.tensors}
        self.tensors = {name: source.tensors[name] for name, source in self._source_of.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return self._source_of[block.tensor].read(block)


class CastSource:
    """Another source's tensors, those of a floating point type in another one.

    Args:
        source: where the elements come from.
        dtype: of all floating point tensors, but for those in `kept`.
        kept: names of tensors that stay as they are.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype, kept: frozenset[str] = frozenset()):
        self._source = source
        self.tensors = {
            name: TensorSpec(spec.shape, dtype) if spec.dtype.is_floating_point and name not in kept else spec
            for name, spec in source.tensors.items()
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return self._source.read(block).to(self.tensors[block.tensor].dtype)


class FiniteSource:
    """Another source's tensors, refused where they are not finite.

    Args:
        source: where the elements come from.
    """

    def __init__(self, source: TensorSource):
        self._source = source
        self.tensors = source.tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`.

        Raises:
            UserError: there is NaN or infinity among the elements.
        """
        elements = self._source.read(block)
        if elements.is_floating_point() and elements.numel() and not all(map(torch.isfinite, elements.aminmax())):
            raise UserError(f"{block.tensor} holds NaN or infinite values; pass --allow-nan to convert it nevertheless")
        return elements
