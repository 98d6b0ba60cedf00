"""Tensors as sources of blocks, and views of them under other names and shapes."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import prod
from typing import Protocol

import torch
from torch import Tensor


class UncoveredTensor(ValueError):
    """Copies leave out a part of a tensor, or fill it twice."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that need not be in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Of all its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """A box of elements of a named tensor: `sizes` elements from `offsets` on, in every dimension."""

    tensor: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, name: str, shape: Sequence[int]) -> "Block":
        """All of a tensor."""
        return cls(name, (0,) * len(shape), tuple(shape))

    @classmethod
    def rows(cls, name: str, shape: Sequence[int], start: int, stop: int) -> "Block":
        """Rows `start` to `stop` of a tensor's first dimension."""
        return cls(name, (start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))

    @property
    def num_elements(self) -> int:
        """In the box."""
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """To index the tensor with."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))

    def intersection(self, other: "Block") -> "Block | None":
        """The box that is in both, of the same tensor; None if there is none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = map(min, _stops(self), _stops(other))
        sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Block(self.tensor, starts, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Block") -> tuple[slice, ...]:
        """To index a tensor that holds just `outer` with."""
        starts = (mine - theirs for mine, theirs in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


@dataclass(frozen=True)
class Copy:
    """Elements that one tensor has from another: those of two blocks, in row-major order."""

    source: Block
    target: Block

    def __post_init__(self):
        if self.source.num_elements != self.target.num_elements:
            raise ValueError(f"{self.source} and {self.target} differ in size")

    @property
    def inverse(self) -> "Copy":
        """The way back."""
        return Copy(self.target, self.source)


class TensorSource(Protocol):
    """Tensors that are read block by block.

    Attributes:
        tensors: by name.
    """

    tensors: Mapping[str, TensorSpec]

    def read(self, block: Block) -> Tensor:
        """The block's elements: `[*block.sizes]`, in host memory.

        Raises:
            UserError: they cannot be read.
        """


class RearrangedSource:
    """Another source's tensors under other names and shapes.

    Args:
        source: where the elements come from.
        shapes: of the tensors that this source has, by name.
        copies: which fill each of those tensors exactly once. Its dtype is that of what it is filled from.

    Raises:
        UncoveredTensor: they do not.
    """

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]], copies: Iterable[Copy]):
        self._source = source
        self._copies: dict[str, list[Copy]] = defaultdict(list)
        for copy in copies:
            self._copies[copy.target.tensor].append(copy)
        check_cover(shapes, (copy.target for of_tensor in self._copies.values() for copy in of_tensor))
        self.tensors = {name: TensorSpec(shape, self._dtype(name)) for name, shape in shapes.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        parts = [(wanted, copy) for copy in self._copies[block.tensor] if (wanted := block.intersection(copy.target))]
        if len(parts) == 1:  # the cover is exact, so this is all of the block
            return self._read_part(parts[0][1], block)
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for wanted, copy in parts:
            result[wanted.within(block)] = self._read_part(copy, wanted)
        return result

    def _read_part(self, copy: Copy, wanted: Block) -> Tensor:
        """Elements of a copy's target."""
        narrowed = _narrow(copy, wanted)
        part = self._source.read(narrowed.source).reshape(narrowed.target.sizes)
        return part[wanted.within(narrowed.target)]

    def _dtype(self, name: str) -> torch.dtype:
        dtypes = {self._source.tensors[copy.source.tensor].dtype for copy in self._copies[name]}
        if len(dtypes) > 1:
            raise UncoveredTensor(f"{name} would be filled from tensors of different types: {sorted(map(str, dtypes))}")
        return dtypes.pop()


def row_major_blocks(name: str, spec: TensorSpec, max_bytes: int) -> Iterator[Block]:
    """Divide a tensor into blocks of at most `max_bytes` (or one element) that are contiguous, and in order, in memory.

    An empty tensor has none.
    """
    if not spec.num_bytes:
        return
    row_bytes = [prod(spec.shape[d + 1 :]) * spec.dtype.itemsize for d in range(len(spec.shape))]
    split = next((d for d, size in enumerate(row_bytes) if size <= max_bytes), len(spec.shape) - 1)
    if split < 0:
        yield Block.whole(name, spec.shape)
        return
    step = max(1, max_bytes // row_bytes[split])
    for leading in product(*map(range, spec.shape[:split])):
        for start in range(0, spec.shape[split], step):
            sizes = (*(1 for _ in leading), min(step, spec.shape[split] - start), *spec.shape[split + 1 :])
            yield Block(name, (*leading, start, *(0 for _ in spec.shape[split + 1 :])), sizes)


def check_cover(shapes: Mapping[str, tuple[int, ...]], blocks: Iterable[Block]) -> None:
    """Check that blocks cover every tensor, each element once.

    Raises:
        UncoveredTensor: naming the first tensor for which they do not.
    """
    by_tensor: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        by_tensor[block.tensor].append(block)
    for name in by_tensor.keys() - shapes.keys():
        raise UncoveredTensor(f"there is no tensor {name}")
    for name, shape in shapes.items():
        whole = Block.whole(name, shape)
        parts = [block for block in by_tensor[name] if block.num_elements]
        if any(block.intersection(whole) != block for block in parts):
            raise UncoveredTensor(f"{name} {list(shape)} is smaller than what would be copied to it")
        covered = sum(block.num_elements for block in parts)
        if covered != whole.num_elements or (len(parts) > 1 and _any_overlap(parts)):
            raise UncoveredTensor(f"{name} {list(shape)} is not covered exactly once")


def _any_overlap(blocks: Iterable[Block], dimension: int = 0) -> bool:
    """Whether two of the blocks of one tensor share an element.

    Blocks that are apart in one dimension are not compared in the next.
    """
    for near in _overlapping_runs(blocks, dimension):
        if dimension + 1 < len(near[0].offsets):
            overlap = _any_overlap(near, dimension + 1)
        else:
            overlap = any(first.intersection(second) for first, second in combinations(near, 2))
        if overlap:
            return True
    return False


def _overlapping_runs(blocks: Iterable[Block], dimension: int) -> Iterator[list[Block]]:
    """The groups of two or more blocks whose intervals in one dimension hang together."""
    run: list[Block] = []
    stop = 0
    for block in sorted(blocks, key=lambda block: block.offsets[dimension]):
        if run and block.offsets[dimension] >= stop:
            if len(run) > 1:
                yield run
            run = []
        run.append(block)
        stop = max(stop, block.offsets[dimension] + block.sizes[dimension])
    if len(run) > 1:
        yield run


def _narrow(copy: Copy, wanted: Block) -> Copy:
    """The part of a copy that holds `wanted`, cut in the leading dimensions that both sides have in common."""
    source, target = copy.source, copy.target
    for ours, theirs in zip(_without_ones(source), _without_ones(target), strict=False):
        if copy.source.sizes[ours] != copy.target.sizes[theirs]:
            break
        first = wanted.offsets[theirs] - copy.target.offsets[theirs]
        source = _cut(source, ours, first, wanted.sizes[theirs])
        target = _cut(target, theirs, first, wanted.sizes[theirs])
    return Copy(source, target)


def _without_ones(block: Block) -> list[int]:
    return [dimension for dimension, size in enumerate(block.sizes) if size != 1]


def _cut(block: Block, dimension: int, first: int, count: int) -> Block:
    offsets = list(block.offsets)
    sizes = list(block.sizes)
    offsets[dimension] += first
    sizes[dimension] = count
    return Block(block.tensor, tuple(offsets), tuple(sizes))


def _stops(block: Block) -> tuple[int, ...]:
    return tuple(offset + size for offset, size in zip(block.offsets, block.sizes, strict=True))
