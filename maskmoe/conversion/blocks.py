"""Blocks of tensors: boxes of elements, the copies between them, and the check that blocks cover tensors exactly."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import add, sub

import numpy as np
import torch

BLOCK_BYTES = 16 << 20
"""Upper bound of a block's size when a tensor is read or written block by block."""


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
