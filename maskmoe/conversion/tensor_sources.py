"""Sources of named tensors that are read block by block: in memory, joined, cast, checked, or views."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol, Self

import torch
from torch import Tensor
from tqdm import tqdm

from maskmoe.conversion.blocks import Block, Copy, CoverageError, TensorSpec, check_cover
from maskmoe.errors import UserError


class TensorSource(Protocol):
    """A set of named tensors that are read block by block."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The tensors' shapes and dtypes by name."""
        ...

    def read(self, block: Block) -> Tensor:
        """Read the elements of a block into host memory.

        Returns:
            a tensor of the shape `block.sizes`.

        Raises:
            UserError: the elements cannot be read.
        """
        ...


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


class RearrangedSource:
    """A view of another source's tensors under other names and shapes.

    Args:
        source: provides the elements.
        shapes: shapes of the view's tensors by name.
        copies: fill each of the view's tensors exactly once. A tensor has the dtype of the tensors that fill it.

    Raises:
        CoverageError: the copies leave out or repeat an element, or fill a tensor from tensors of different dtypes.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], copies: Iterable[Copy]) -> None:
        self._source = source
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            self._copies[copy.target.tensor].append(copy)
        check_cover(shapes, (copy.target for tensor_copies in self._copies.values() for copy in tensor_copies))
        self.tensors: dict[str, TensorSpec] = {}
        for name, shape in shapes.items():
            dtype, *others = {source.tensors[copy.source.tensor].dtype for copy in self._copies[name]}
            if others:
                types = sorted(map(str, (dtype, *others)))
                raise CoverageError(f"{name} would be filled from tensors of different types: {types}")
            self.tensors[name] = TensorSpec(shape, dtype)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for copy in self._copies[block.tensor]:
            if part := block.intersection(copy.target):
                elements = self._source.read(copy.source_of(part)).reshape(part.sizes)
                if part == block:  # the copies cover the tensor exactly, so this part is all
                    return elements
                result[part.within(block).slices] = elements
        return result


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


class ProgressSource:
    """Shows on a progress bar how many bytes of another source have been read, until its context is left.

    Args:
        source: provides the elements.
        names: the names of the tensors that will be read, each once.
    """

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        self._source = source
        self.tensors = {name: source.tensors[name] for name in names}
        total = sum(spec.num_bytes for spec in self.tensors.values())
        self._bar = tqdm(total=total, desc="converting", unit="B", unit_scale=True, unit_divisor=1024)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        elements = self._source.read(block)
        self._bar.update(elements.nbytes)
        return elements
