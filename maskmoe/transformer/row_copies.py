"""Copies of rows, and sums of copies."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RowCopies:
    """Which row each copy is of, and where it is meant to go.

    Attributes:
        rows: int64 [copies], the row that each copy is of. Copies are ordered by target, then by row.
        targets: int64 [copies].
        order: int64 [copies], the copies ordered by row, then by target.
        offsets: int64 [rows], where each row's copies begin in `order`.
        is_permutation: every row has one copy.
    """

    rows: Tensor
    targets: Tensor
    order: Tensor
    offsets: Tensor
    is_permutation: bool

    @classmethod
    def from_map(cls, copied: Tensor, num_copies: int, has_every_row: bool) -> "RowCopies":
        """The copies that a map asks for. Nothing waits for the device.

        Args:
            copied: bool [rows, targets].
            num_copies: how many of its elements are True.
            has_every_row: every row is known to have a copy.
        """
        targets, rows = torch.nonzero_static(copied.t(), size=num_copies).unbind(1)
        copies_of_row = copied.sum(dim=1)
        return cls(
            rows=rows,
            targets=targets,
            order=rows.argsort(stable=True),
            offsets=copies_of_row.cumsum(0) - copies_of_row,
            is_permutation=has_every_row and num_copies == len(copied),
        )

    @classmethod
    def permutation(cls, rows: Tensor) -> "RowCopies":
        """One copy of each row; rows: int64 [rows], the row that each copy is of."""
        numbers = torch.arange(len(rows), device=rows.device)
        order = torch.empty_like(rows).scatter(0, rows, numbers)
        return cls(rows, torch.zeros_like(rows), order, numbers, is_permutation=True)

    def take(self, values: Tensor) -> Tensor:
        """The copies [copies, …] of rows [rows, …], with `sum` as its gradient."""
        return _Take.apply(values, self)

    def take_now(self, values: Tensor) -> Tensor:
        """`take` without a gradient."""
        return _take_rows(values, self.rows)

    def take_into(self, out: Tensor, values: Tensor) -> Tensor:
        """`take_now` into memory that is there."""
        return torch.index_select(values, 0, self.rows, out=out)

    def sum_now(self, copies: Tensor) -> Tensor:
        """For each row [rows, features] the sum of its copies [copies, features], in the order of their targets."""
        if self.is_permutation:
            return _take_rows(copies, self.order)
        if len(self.order) == 0:
            return copies.new_zeros(len(self.offsets), *copies.shape[1:])
        return F.embedding_bag(self.order, copies, self.offsets, mode="sum")

    def sum_into(self, out: Tensor, copies: Tensor) -> Tensor:
        """`sum_now`, into memory that is there if that is of use."""
        return torch.index_select(copies, 0, self.order, out=out) if self.is_permutation else self.sum_now(copies)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, copies: RowCopies) -> Tensor:
        ctx.copies = copies
        return copies.take_now(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.copies.sum_now(gradient.contiguous()), None


def _take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """`values[rows]`: [rows, features] of [values, features]."""
    if values.device.type != "cpu" or len(rows) == 0:
        return values.index_select(0, rows)
    # The CPU's kernel for sums fetches rows ahead, by which it is faster than the one that only copies.
    return F.embedding_bag(rows, values, torch.arange(len(rows)), mode="sum")
