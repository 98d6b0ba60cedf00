"""Blocks of tensors, sources that read tensors block by block, and views that rename and reshape a source's tensors."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Protocol

import torch
from torch import Tensor


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
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = map(min, _stops(self), _stops(other))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Block(self.tensor, starts, sizes) if all(size > 0 for size in sizes) else None

    def slices_within(self, outer: "Block") -> tuple[slice, ...]:
        """Return the indices that select this block in a tensor that holds just the elements of `outer`."""
        starts = (inner - start for inner, start in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True)
class Copy:
    """A rule: the elements of the block `target` are those of the block `source`, both in row-major order.

    Raises:
        ValueError: the blocks have different numbers of elements.
    """

    source: Block
    target: Block

    def __post_init__(self) -> None:
        if self.source.num_elements != self.target.num_elements:
            raise ValueError(f"{self.source} and {self.target} differ in size")

    @property
    def inverse(self) -> "Copy":
        """The copy from `target` to `source`."""
        return Copy(self.target, self.source)


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
        self.tensors = {name: TensorSpec(shape, self._dtype(name)) for name, shape in shapes.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        parts = [(part, copy) for copy in self._copies[block.tensor] if (part := block.intersection(copy.target))]
        if len(parts) == 1:  # the copies cover the tensor exactly, so this part is the whole block
            return self._read_part(parts[0][1], block)
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for part, copy in parts:
            result[part.slices_within(block)] = self._read_part(copy, part)
        return result

    def _read_part(self, copy: Copy, part: Block) -> Tensor:
        """Read a part of a copy's target block."""
        narrowed = _narrow(copy, part)
        elements = self._source.read(narrowed.source).reshape(narrowed.target.sizes)
        return elements[part.slices_within(narrowed.target)]

    def _dtype(self, name: str) -> torch.dtype:
        dtypes = {self._source.tensors[copy.source.tensor].dtype for copy in self._copies[name]}
        if len(dtypes) > 1:
            raise CoverageError(f"{name} would be filled from tensors of different types: {sorted(map(str, dtypes))}")
        return dtypes.pop()


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
    row_bytes = [prod(spec.shape[d + 1 :]) * spec.dtype.itemsize for d in range(len(spec.shape))]
    split = next((d for d, size in enumerate(row_bytes) if size <= max_bytes), len(spec.shape) - 1)
    if split < 0:  # a scalar
        yield Block.whole(name, spec.shape)
        return
    step = max(1, max_bytes // row_bytes[split])
    for leading in product(*map(range, spec.shape[:split])):
        for start in range(0, spec.shape[split], step):
            sizes = (*(1 for _ in leading), min(step, spec.shape[split] - start), *spec.shape[split + 1 :])
            yield Block(name, (*leading, start, *(0 for _ in spec.shape[split + 1 :])), sizes)


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
        covered = sum(block.num_elements for block in parts)
        if covered != whole.num_elements or (len(parts) > 1 and _any_overlap(parts)):
            raise CoverageError(f"{name} {list(shape)} is not covered exactly once")


def _any_overlap(blocks: Iterable[Block], dimension: int = 0) -> bool:
    """Return whether two blocks of one tensor share an element, looking at `dimension` and later dimensions only.

    Blocks that are apart in one dimension are not compared in the next, which keeps large covers fast to check.
    """
    for connected in _connected_blocks(blocks, dimension):
        if dimension + 1 < len(connected[0].offsets):
            overlap = _any_overlap(connected, dimension + 1)
        else:
            overlap = any(first.intersection(second) for first, second in combinations(connected, 2))
        if overlap:
            return True
    return False


def _connected_blocks(blocks: Iterable[Block], dimension: int) -> Iterator[list[Block]]:
    """Yield the groups of two or more blocks whose intervals in one dimension overlap in a chain."""
    group: list[Block] = []
    stop = 0
    for block in sorted(blocks, key=lambda block: block.offsets[dimension]):
        if group and block.offsets[dimension] >= stop:
            if len(group) > 1:
                yield group
            group = []
        group.append(block)
        stop = max(stop, block.offsets[dimension] + block.sizes[dimension])
    if len(group) > 1:
        yield group


def _narrow(copy: Copy, part: Block) -> Copy:
    """Reduce a copy so that it still fills `part` of its target but reads less of its source.

    Only the leading dimensions that both blocks have in common can be cut: behind the first difference, a box of the
    target is not a box of the source.
    """
    source, target = copy.source, copy.target
    for source_dimension, target_dimension in zip(_long_dimensions(source), _long_dimensions(target), strict=False):
        if copy.source.sizes[source_dimension] != copy.target.sizes[target_dimension]:
            break
        start = part.offsets[target_dimension] - copy.target.offsets[target_dimension]
        count = part.sizes[target_dimension]
        source = _cut(source, source_dimension, start, count)
        target = _cut(target, target_dimension, start, count)
    return Copy(source, target)


def _long_dimensions(block: Block) -> list[int]:
    """Return the dimensions in which a block has other than one element."""
    return [dimension for dimension, size in enumerate(block.sizes) if size != 1]


def _cut(block: Block, dimension: int, start: int, count: int) -> Block:
    """Return the `count` entries of a block from its entry `start` on, in one dimension."""
    offsets = list(block.offsets)
    sizes = list(block.sizes)
    offsets[dimension] += start
    sizes[dimension] = count
    return Block(block.tensor, tuple(offsets), tuple(sizes))


def _stops(block: Block) -> tuple[int, ...]:
    return tuple(offset + size for offset, size in zip(block.offsets, block.sizes, strict=True))
