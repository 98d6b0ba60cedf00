"""Copies of rows, and sums of copies, without a sort: the Triton counterpart of `SortedCopies`.

Positions of copies are counted, not sorted: one kernel counts the copies of each target in blocks of rows, a cumulative
sum turns the counts into the first position of each target and block, and a second kernel numbers the copies.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskmoe.transformer.dispatch.rows import RowCopies
from maskmoe.transformer.kernels import launching

_MAP_BLOCK = 4096
"""Elements of the map that a program reads."""
_ROW_BLOCK, _FEATURE_BLOCK = 8, 256
"""Rows and features that a program copies."""


@dataclass(frozen=True)
class SlottedCopies(RowCopies):
    """Describes copies of rows by the positions of each row's copies. `source` is int32.

    If there is room for more copies than there are, the elements of `source` behind the last copy are undefined.

    Attributes:
        slots: int32 [rows, width], the positions of a row's copies by target; -1 where a row has fewer copies.
    """

    slots: Tensor

    @classmethod
    def from_map(cls, chosen: Tensor, num_copies: int, max_copies: int, columns: slice) -> "SlottedCopies":
        """Describe the copies that a map asks for; see `copies_of_map`."""
        num_rows, row_size = chosen.shape
        first, end, _ = columns.indices(row_size)
        num_targets, width = end - first, max(max_copies, 1)
        block = max(_MAP_BLOCK // triton.next_power_of_2(num_targets), 1)
        num_blocks = triton.cdiv(num_rows, block)
        counts = chosen.new_empty(num_targets * num_blocks, dtype=torch.int32)
        sizes = (num_rows, row_size, first, num_targets, num_blocks)
        constants = {"BLOCK": block, "TARGETS": triton.next_power_of_2(num_targets)}
        launching.launch(_count, (num_blocks,), chosen, counts, *sizes, **constants)
        ends = counts.cumsum(0, dtype=torch.int32)
        source = counts.new_empty(num_copies)
        slots = counts.new_empty(num_rows, width)
        constants["WIDTH"] = triton.next_power_of_2(width)
        launching.launch(_place, (num_blocks,), chosen, ends, source, slots, *sizes, width, **constants)
        return cls(source, slots)

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.slots)

    @property
    def first_copies(self) -> Tensor:
        """The position of the first copy of each row, int32 [rows]."""
        return self.slots[:, 0]

    def copy_rows(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy rows; see `RowCopies`."""
        return self._launch(_copy, values, len(self.source), out)

    def sum_copies(self, copies: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum copies; see `RowCopies`. Sums are rounded once."""
        accumulator = tl.float64 if copies.dtype == torch.float64 else tl.float32
        return self._launch(_sum, copies, self.num_rows, out, ACCUMULATOR=accumulator)

    def _launch(self, kernel: Any, values: Tensor, num_results: int, out: Tensor | None, **constants: Any) -> Tensor:
        """Launch a kernel that goes through all rows and features; return its result."""
        num_rows, width = self.slots.shape
        num_features = values.shape[1]
        out = values.new_empty(num_results, *values.shape[1:]) if out is None else out
        grid = (triton.cdiv(num_rows, _ROW_BLOCK), triton.cdiv(num_features, _FEATURE_BLOCK))
        constants |= {"ROWS": _ROW_BLOCK, "FEATURES": _FEATURE_BLOCK}
        launching.launch(kernel, grid, values, self.slots, out, num_rows, num_features, width, **constants)
        return out


@triton.jit
def _load_map(chosen, num_rows, row_size, first, num_targets, BLOCK: tl.constexpr, TARGETS: tl.constexpr):
    """Load this program's rows of the map.

    Returns:
        rows [BLOCK, 1], targets [1, TARGETS], and int32 [BLOCK, TARGETS], 1 where the target gets a copy of the row.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]
    targets = tl.arange(0, TARGETS)[None, :]
    inside = (rows < num_rows) & (targets < num_targets)
    is_copied = tl.load(chosen + rows.to(tl.int64) * row_size + first + targets, mask=inside, other=0)
    return rows, targets, is_copied.to(tl.int32)


@triton.jit
def _count(
    chosen,  # bool [rows, columns]
    counts,  # int32 [targets, blocks], written
    num_rows,
    row_size,
    first,
    num_targets,
    num_blocks,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """Count the copies of each target in each block of rows."""
    _, _, is_copied = _load_map(chosen, num_rows, row_size, first, num_targets, BLOCK, TARGETS)
    targets = tl.arange(0, TARGETS)
    positions = targets * num_blocks + tl.program_id(0)
    tl.store(counts + positions, tl.sum(is_copied, axis=0), mask=targets < num_targets)


@triton.jit
def _place(
    chosen,  # bool [rows, columns]
    ends,  # int32 [targets, blocks], the position after the last copy of each target and block
    source,  # int32 [copies], written
    slots,  # int32 [rows, width], written
    num_rows,
    row_size,
    first,
    num_targets,
    num_blocks,
    width,
    BLOCK: tl.constexpr,
    TARGETS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Number the copies by target, then by row."""
    rows, targets, is_copied = _load_map(chosen, num_rows, row_size, first, num_targets, BLOCK, TARGETS)
    end = tl.load(ends + targets * num_blocks + tl.program_id(0), mask=targets < num_targets, other=0)
    # Copies in this block from a row on, counted from the end.
    position = end - tl.cumsum(is_copied, axis=0, reverse=True)
    slot = tl.cumsum(is_copied, axis=1) - is_copied
    tl.store(source + position, rows * row_size + first + targets, mask=is_copied != 0)
    tl.store(slots + rows * width + slot, position, mask=is_copied != 0)
    # Mark the slots behind a row's copies as empty.
    slot = tl.arange(0, WIDTH)[None, :]
    num_slots = tl.sum(is_copied, axis=1, keep_dims=True)
    is_empty = (slot >= num_slots) & (slot < width) & (rows < num_rows)
    tl.store(slots + rows * width + slot, tl.full((BLOCK, WIDTH), -1, tl.int32), mask=is_empty)


@triton.jit
def _locate_tile(num_rows, num_features, ROWS: tl.constexpr, FEATURES: tl.constexpr):
    """Return this program's rows [ROWS, 1] and features [1, FEATURES], and which elements exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)[None, :]
    inside = (rows < num_rows) & (features < num_features)
    return rows, features, inside


@triton.jit
def _copy(
    values,  # [rows, features]
    slots,  # int32 [rows, width]
    copies,  # [copies, features], written
    num_rows,
    num_features,
    width,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """Copy each row to its slots."""
    rows, features, inside = _locate_tile(num_rows, num_features, ROWS, FEATURES)
    row = tl.load(values + rows * num_features + features, mask=inside)
    for slot in range(width):
        position = tl.load(slots + rows * width + slot, mask=rows < num_rows, other=-1).to(tl.int64)
        tl.store(copies + position * num_features + features, row, mask=inside & (position >= 0))


@triton.jit
def _sum(
    copies,  # [copies, features]
    slots,  # int32 [rows, width]
    sums,  # [rows, features], written
    num_rows,
    num_features,
    width,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Add the copies of each row, in the order of its slots."""
    rows, features, inside = _locate_tile(num_rows, num_features, ROWS, FEATURES)
    total = tl.zeros((ROWS, FEATURES), ACCUMULATOR)
    for slot in range(width):
        position = tl.load(slots + rows * width + slot, mask=rows < num_rows, other=-1).to(tl.int64)
        copy = tl.load(copies + position * num_features + features, mask=inside & (position >= 0), other=0.0)
        total += copy.to(ACCUMULATOR)
    tl.store(sums + rows * num_features + features, total.to(sums.dtype.element_ty), mask=inside)
