"""Blocks of named tensors, and sources that read tensors block by block: in memory, joined, cast, checked, or views."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, sub
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from maskmoe.errors import UserError

BLOCK_BYTES = 16 << 20
"""Upper bound of a block's size when a tensor is read or written block by block."""


class CoverageError(UserError):
    """Reports that blocks leave out a part of a tensor, or cover a part twice."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of all elements in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """A box of elements of a named tensor: `sizes` elements from `offsets` on, in every dimension."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> "Block":
        """Return the block that holds all elements of a tensor."""
        return cls(name, (0,) * len(shape), tuple(shape))

    @classmethod
    def rows(cls, name: str, shape: Sequence[int], start: int, stop: int) -> "Block":
        """Return the block that holds rows `start` to `stop` (exclusive) of a tensor's first dimension."""
        return cls(name, (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))

    @property
    def num_elements(self) -> int:
        """Number of elements in the block."""
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Indices that select the block in its tensor."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))

    def intersection(self, other: "Block") -> "Block | None":
        """Return the elements that two blocks of one tensor share, as a block; None if they share none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = map(min, map(add, self.offsets, self.sizes), map(add, other.offsets, other.sizes))
        sizes = tuple(map(sub, stops, starts))
        return Block(self.tensor, starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Block") -> "Block":
        """Return this block as a block of a tensor that holds just the elements of `outer`."""
        return Block(self.tensor, tuple(map(sub, self.offsets, outer.offsets)), self.sizes)


@dataclass(frozen=True)
class Copy:
    """A rule: the elements of the block `target` are those of the block `source`.

    Raises:
        ValueError: The blocks differ in more than dimensions of one element.
    """

    source: Block
    target: Block

    def __post_init__(self) -> None:
        if [size for size in self.source.sizes if size != 1] != [size for size in self.target.sizes if size != 1]:
            raise ValueError(f"{self.source} and {self.target} differ in size")

    def source_of(self, part: Block) -> Block:
        """Return the block whose elements fill `part`, which lies inside `target`."""
        inner = part.within(self.target)
        extents = zip(inner.offsets, inner.sizes, self.target.sizes, strict=True)
        long_extents = iter([(start, count) for start, count, size in extents if size != 1])
        cuts = [(0, 1) if size == 1 else next(long_extents) for size in self.source.sizes]
        starts, sizes = zip(*cuts, strict=True) if cuts else ((), ())
        return Block(self.source.tensor, tuple(map(add, self.source.offsets, starts)), sizes)


def row_major_blocks(name: str, spec: TensorSpec, max_bytes: int) -> Iterator[Block]:
    """Divide a tensor into blocks that are contiguous in memory, in the order of memory.

    Args:
        name: Name of the tensor.
        spec: Shape and dtype of the tensor.
        max_bytes: Upper bound of a block's size, unless one element alone is larger.

    Yields:
        The blocks; none for a tensor without elements.
    """
    if not spec.num_bytes:
        return
    row_bytes = [prod(spec.shape[d:]) * spec.dtype.itemsize for d in range(len(spec.shape) + 1)]
    num_cut = next((d for d, size in enumerate(row_bytes) if size <= max_bytes), len(spec.shape))
    if num_cut == 0:
        yield Block.whole(name, spec.shape)
        return
    # Cut the first dimensions into single indices, and the last of them into ranges.
    *leading, num_rows = spec.shape[:num_cut]
    inner = spec.shape[num_cut:]
    step = max(1, max_bytes // row_bytes[num_cut])
    for indices in np.ndindex(*leading):
        for start in range(0, num_rows, step):
            sizes = (*(1 for _ in indices), min(step, num_rows - start), *inner)
            yield Block(name, (*indices, start, *(0 for _ in inner)), sizes)


def check_cover(shapes: Mapping[str, tuple[int, ...]], blocks: Iterable[Block]) -> None:
    """Check that blocks cover each element of each tensor exactly once.

    Args:
        shapes: Shapes of the tensors by name.
        blocks: Blocks of these tensors, in any order.

    Raises:
        CoverageError: A tensor is not covered exactly once, or a block is of another tensor; names the first one.
    """
    blocks_by_tensor: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        blocks_by_tensor[block.tensor].append(block)
    for name in blocks_by_tensor.keys() - shapes.keys():
        raise CoverageError(f"there is no tensor {name}")
    for name, shape in shapes.items():
        whole = Block.whole(name, shape)
        parts = [block for block in blocks_by_tensor[name] if block.num_elements]
        if any(block.intersection(whole) != block for block in parts):
            raise CoverageError(f"{name} {list(shape)} is smaller than what would be copied to it")
        if parts != [whole] and (_times_covered(whole, parts) != 1).any():
            raise CoverageError(f"{name} {list(shape)} is not covered exactly once")


def _times_covered(whole: Block, parts: Sequence[Block]) -> np.ndarray:
    """Return how many of its parts cover each cell of a tensor, int32 [cells in each dimension].

    The edges of the parts divide the tensor into cells, and a part covers a cell completely or not at all.
    """
    extents_by_dimension = list(zip(*(block.slices for block in (whole, *parts)), strict=True))
    edges = [np.unique([(extent.start, extent.stop) for extent in extents]) for extents in extents_by_dimension]
    counts = np.zeros([len(values) - 1 for values in edges], np.int32)
    for part in parts:
        firsts = map(np.searchsorted, edges, part.offsets)
        stops = map(np.searchsorted, edges, map(add, part.offsets, part.sizes))
        counts[tuple(map(slice, firsts, stops))] += 1
    return counts


class TensorSource(Protocol):
    """A set of named tensors that are read block by block."""

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """The tensors' shapes and dtypes by name."""
        ...

    def read(self, block: Block) -> Tensor:
        """Read the elements of a block into host memory.

        Returns:
            A tensor of the shape `block.sizes`.

        Raises:
            UserError: The elements cannot be read.
        """
        ...


class MemorySource:
    """Provides tensors that are in memory.

    Args:
        tensors: The tensors by name.
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
        source: Provides the elements.
        shapes: Shapes of the view's tensors by name.
        copies: Fill each of the view's tensors exactly once. A tensor has the dtype of the tensors that fill it.

    Raises:
        CoverageError: The copies leave out or repeat an element, or fill a tensor from tensors of different dtypes.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], copies: Iterable[Copy]) -> None:
        self._source = source
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            self._copies[copy.target.tensor].append(copy)
        check_cover(shapes, (copy.target for tensor_copies in self._copies.values() for copy in tensor_copies))
        # The bounds of the copies, int64 [copies, dimensions]. They are arrays because a tensor may have tens of
        # thousands of copies, which `read` compares with each block.
        self._starts = {name: np.array([copy.target.offsets for copy in each]) for name, each in self._copies.items()}
        self._stops = {
            name: self._starts[name] + [copy.target.sizes for copy in each] for name, each in self._copies.items()
        }
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
        starts, stops = self._starts[block.tensor], self._stops[block.tensor]
        is_met = (starts < np.add(block.offsets, block.sizes)) & (stops > np.array(block.offsets))
        for number in np.flatnonzero(is_met.all(axis=1)):
            copy = self._copies[block.tensor][number]
            part = block.intersection(copy.target)
            assert part is not None
            elements = self._source.read(copy.source_of(part)).reshape(part.sizes)
            if part == block:  # the copies cover the tensor exactly, so this part is all
                return elements
            result[part.within(block).slices] = elements
        return result


class JoinedSource:
    """Joins the tensors of several sources.

    Args:
        sources: The sources; if several have a tensor of one name, the first of them provides the tensor.
    """

    def __init__(self, *sources: TensorSource) -> None:
        self._source_of = {name: source for source in reversed(sources) for name in source.tensors}
        self.tensors = {name: source.tensors[name] for name, source in self._source_of.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._source_of[block.tensor].read(block)


class ScaledSource:
    """Multiplies some tensors of another source by a factor.

    Args:
        source: Provides the elements.
        factors: The factor of each tensor that is multiplied.
    """

    def __init__(self, source: TensorSource, factors: Mapping[str, float]) -> None:
        self._source, self._factors = source, factors
        self.tensors = source.tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        elements, factor = self._source.read(block), self._factors.get(block.tensor)
        return elements if factor is None else elements * factor


class CastSource:
    """Casts the floating point tensors of another source, and refuses values that are NaN or infinite.

    A value may become infinite by the cast.

    Args:
        source: Provides the elements.
        dtype: The dtype of all floating point tensors except `kept`; None keeps all dtypes.
        kept: Names of tensors that keep their dtype.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype | None, kept: frozenset[str] = frozenset()) -> None:
        self._source = source
        self.tensors = {
            name: TensorSpec(spec.shape, dtype) if dtype and spec.dtype.is_floating_point and name not in kept else spec
            for name, spec in source.tensors.items()
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`.

        Raises:
            UserError: An element of the block is NaN or infinite.
        """
        elements = self._source.read(block).to(self.tensors[block.tensor].dtype)
        if elements.is_floating_point() and elements.numel() and not all(map(torch.isfinite, elements.aminmax())):
            raise UserError(f"{block.tensor} holds NaN or infinite values")
        return elements
