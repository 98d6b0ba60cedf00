"""Blocks of tensors, covers of tensors by blocks, and sources that rearrange the tensors of other sources."""

from itertools import pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.conversion.tensor_sources import (
    Block,
    CastSource,
    Copy,
    CoverageError,
    MemorySource,
    RearrangedSource,
    TensorSpec,
    check_cover,
    row_major_blocks,
)
from maskmoe.errors import UserError

SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


@st.composite
def blocks_of(draw, name, shape):
    """Draw a block with at least one element."""
    bounds = [draw(st.tuples(st.integers(0, size - 1), st.integers(1, size))) for size in shape]
    starts = [min(first, last - 1) for first, last in bounds]
    return Block(name, tuple(starts), tuple(last - start for start, (_, last) in zip(starts, bounds, strict=True)))


@st.composite
def grids(draw, name, shape):
    """Draw blocks that divide a tensor, in a random order."""
    cuts = [sorted({0, size, *draw(st.sets(st.integers(1, size)))}) for size in shape]
    intervals = [list(pairwise(edges)) for edges in cuts]
    cells = [
        Block(name, tuple(start for start, _ in cell), tuple(stop - start for start, stop in cell))
        for cell in product(*intervals)
    ]
    return draw(st.permutations(cells))


@st.composite
def rearrangements(draw):
    """Draw a tensor, with shapes and copies that rearrange all its elements into other tensors."""
    shape = draw(SHAPES)
    source = torch.arange(prod(shape)).view(shape)
    shapes, copies = {}, []
    for index, cell in enumerate(draw(grids("source", shape))):
        # Cells of equal sizes are stacked, or their rows concatenated, with or without dimensions of one element.
        kept = [size for size in cell.sizes if size != 1] if draw(st.booleans()) else cell.sizes
        name = f"target{index % 2}.{[*kept]}"
        start = shapes.get(name, (0,))[0]
        sizes = (1, *kept) if index % 2 or not kept else tuple(kept)
        shapes[name] = (start + sizes[0], *sizes[1:])
        target = Block(name, (start, *(0 for _ in sizes[1:])), sizes)
        copies.append(Copy(cell, target))
    return source, shapes, draw(st.permutations(copies))


def rearrange_by_indexing(source, shapes, copies):
    """Return the rearranged tensors, computed by plain indexing."""
    results = {name: torch.full(shape, -1) for name, shape in shapes.items()}
    for copy in copies:
        results[copy.target.tensor][copy.target.slices] = source[copy.source.slices].reshape(copy.target.sizes)
    return results


@given(rearrangements(), st.data())
def test_any_block_of_a_rearranged_tensor(rearrangement, data):
    source, shapes, copies = rearrangement
    expected = rearrange_by_indexing(*rearrangement)
    view = RearrangedSource(MemorySource({"source": source}), shapes, copies)
    for name, shape in shapes.items():
        assert view.tensors[name] == TensorSpec(shape, torch.int64)
        for block in (Block.whole(name, shape), data.draw(blocks_of(name, shape))):
            assert torch.equal(view.read(block), expected[name][block.slices])


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(blocks_of("t", shape), max_size=5))))
def test_a_cover_is_exact_or_refused(case):
    shape, blocks = case
    counts = torch.zeros(shape, dtype=torch.int)
    for block in blocks:
        counts[block.slices] += 1
    if (counts == 1).all():
        check_cover({"t": shape}, blocks)
    else:
        with pytest.raises(CoverageError, match=r"t \["):
            check_cover({"t": shape}, blocks)


def test_scalars_and_empty_tensors():
    source = MemorySource({"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4)})
    copies = [
        Copy(Block.whole(name, spec.shape), Block.whole(name, spec.shape)) for name, spec in source.tensors.items()
    ]
    view = RearrangedSource(source, {name: spec.shape for name, spec in source.tensors.items()}, copies)
    assert view.read(Block.whole("scalar", ())) == 3.0
    assert view.read(Block.whole("empty", (0, 4))).shape == (0, 4)
    assert list(row_major_blocks("scalar", source.tensors["scalar"], 1)) == [Block.whole("scalar", ())]
    assert list(row_major_blocks("empty", source.tensors["empty"], 1)) == []


@given(SHAPES, st.integers(1, 200))
def test_row_major_blocks_are_the_memory_in_order(shape, max_bytes):
    tensor = torch.arange(prod(shape), dtype=torch.int16).view(shape)
    spec = TensorSpec(shape, torch.int16)
    blocks = list(row_major_blocks("t", spec, max_bytes))
    assert torch.cat([tensor[block.slices].flatten() for block in blocks]).tolist() == tensor.flatten().tolist()
    assert all(tensor[block.slices].is_contiguous() for block in blocks)
    assert all(block.num_elements == 1 or 2 * block.num_elements <= max_bytes for block in blocks)
    assert sum(2 * block.num_elements for block in blocks) == spec.num_bytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_values_are_refused(value):
    bad = torch.zeros(3000)
    bad[1234] = value
    with pytest.raises(UserError, match="bad holds NaN or infinite values"):
        CastSource(MemorySource({"bad": bad}), None).read(Block.whole("bad", (3000,)))


def test_a_value_that_the_new_type_cannot_hold_is_refused():
    source = MemorySource({"large": torch.tensor([1e5])})
    assert CastSource(source, torch.bfloat16).read(Block.whole("large", (1,))).isfinite()
    with pytest.raises(UserError, match="large holds NaN or infinite values"):
        CastSource(source, torch.float16).read(Block.whole("large", (1,)))
