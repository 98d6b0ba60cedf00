"""Blocks of tensors, tensors in memory and in files that are read in blocks, and views of such tensors."""

from bisect import bisect, bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, sub
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from maskmoe.errors import UserError


class CoverageError(ValueError):
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
        extents = []
        for mine, my_size, theirs, their_size in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start = max(mine, theirs)
            size = min(mine + my_size, theirs + their_size) - start
            if size <= 0:  # blocks of large tensors are compared with thousands of others
                return None
            extents.append((start, size))
        return Block(self.tensor, tuple(start for start, _ in extents), tuple(size for _, size in extents))

    def within(self, outer: "Block") -> "Block":
        """Return this block as a block of a tensor that holds just the elements of `outer`."""
        return Block(self.tensor, tuple(map(sub, self.offsets, outer.offsets)), self.sizes)


@dataclass(frozen=True)
class Copy:
    """A rule: the elements of the block `target` are those of the block `source`.

    Raises:
        ValueError: the blocks differ in more than dimensions of one element.
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


class _CopyIndex:
    """Finds the copies that fill a block of a tensor without looking at all copies.

    Args:
        copies: fill the tensor exactly once.
    """

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = copies
        self._cells = _Cells([copy.target for copy in copies])
        self._numbers = np.zeros(self._cells.shape, np.int32)  # number of the copy that fills each cell
        for number, copy in enumerate(copies):
            self._numbers[self._cells.of(copy.target)] = number

    def find(self, block: Block) -> Iterator[Copy]:
        """Return the copies that fill elements of a block, in the given order."""
        return (self._copies[number] for number in np.unique(self._numbers[self._cells.of(block)]))


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
        copies_by_tensor: dict[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            copies_by_tensor[copy.target.tensor].append(copy)
        check_cover(shapes, (copy.target for tensor_copies in copies_by_tensor.values() for copy in tensor_copies))
        self.tensors: dict[str, TensorSpec] = {}
        self._copies: dict[str, _CopyIndex] = {}
        for name, shape in shapes.items():
            self._copies[name] = _CopyIndex(copies_by_tensor[name])
            dtype, *others = {source.tensors[copy.source.tensor].dtype for copy in copies_by_tensor[name]}
            if others:
                types = sorted(map(str, (dtype, *others)))
                raise CoverageError(f"{name} would be filled from tensors of different types: {types}")
            self.tensors[name] = TensorSpec(shape, dtype)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        parts = [
            (part, self._source.read(copy.source_of(part)).reshape(part.sizes))
            for copy in self._copies[block.tensor].find(block)
            if (part := block.intersection(copy.target))
        ]
        if len(parts) == 1:  # the copies cover the tensor exactly, so this part is the whole block
            return parts[0][1]
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for part, elements in parts:
            result[part.within(block).slices] = elements
        return result


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


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements lie uncompressed in a file.

    Attributes:
        path: the file.
        start: position of the tensor's storage in the file, in bytes.
        layout: a tensor on the meta device, which has the shape, the strides and the dtype.
    """

    path: Path
    start: int
    layout: Tensor

    def read(self, part: Block) -> Tensor:
        """Read a block of the tensor.

        The read covers one contiguous range of the file, from the block's first element to its last.

        Returns:
            a tensor of the shape `part.sizes`.

        Raises:
            UserError: the file cannot be read, or ends before the block does.
        """
        view = self.layout[part.slices]
        last = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
        num_bytes = (last + 1) * view.itemsize if view.numel() else 0
        start = self.start + view.storage_offset() * view.itemsize
        try:
            content = np.fromfile(self.path, np.uint8, num_bytes, offset=start)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from error
        if len(content) < num_bytes:
            raise UserError(f"{self.path} is damaged: it ends before what it should hold")
        return torch.from_numpy(content).view(view.dtype).as_strided(view.shape, view.stride())


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


def row_major_blocks(name: str, spec: TensorSpec, max_bytes: int) -> Iterator[Block]:
    """Divide a tensor into blocks that are contiguous in memory, in the order of memory.

    Args:
        name: name of the tensor.
        spec: shape and dtype of the tensor.
        max_bytes: upper bound of a block's size, unless one element alone is larger.

    Yields:
        the blocks; none for a tensor without elements.
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
        shapes: shapes of the tensors by name.
        blocks: blocks of these tensors, in any order.

    Raises:
        CoverageError: a tensor is not covered exactly once, or a block is of another tensor; names the first one.
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


class _Cells:
    """The cells into which the edges of blocks divide their tensor; a block covers each cell completely or not at all.

    Args:
        blocks: blocks of one tensor; at least one.

    Attributes:
        shape: number of cells in each dimension.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        extents_by_dimension = zip(*(block.slices for block in blocks), strict=True)
        self._edges = [
            sorted({edge for extent in extents for edge in (extent.start, extent.stop)})
            for extents in extents_by_dimension
        ]
        self.shape = tuple(len(edges) - 1 for edges in self._edges)

    def of(self, block: Block) -> tuple[slice, ...]:
        """Return indices that select the cells that hold a block, whose edges may lie inside cells."""
        firsts = (bisect(edges, start) - 1 for edges, start in zip(self._edges, block.offsets, strict=True))
        stops = map(bisect_left, self._edges, map(add, block.offsets, block.sizes))
        return tuple(map(slice, firsts, stops))


def _times_covered(whole: Block, parts: Sequence[Block]) -> np.ndarray:
    """Return how many of its parts cover each cell of a tensor, int32 [cells in each dimension]."""
    cells = _Cells((whole, *parts))
    counts = np.zeros(cells.shape, np.int32)
    for part in parts:
        counts[cells.of(part)] += 1
    return counts
