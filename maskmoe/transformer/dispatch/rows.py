"""Copies of rows, sums of copies, and all-to-alls of rows: the parts of one-copy and planned dispatch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import embedding_bag

RowMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowCopies:
    """Describes copies of rows: the row that each copy is of, and the target that each copy is for.

    Attributes:
        rows: int64 [copies], the row that each copy is of. Copies are ordered by target, then by row.
        targets: int64 [copies], the target of each copy.
        order: int64 [copies], the copies ordered by row, then by target.
        offsets: int64 [rows], where the copies of each row begin in `order`.
        is_permutation: whether every row has exactly one copy.
    """

    rows: Tensor
    targets: Tensor
    order: Tensor
    offsets: Tensor
    is_permutation: bool

    @classmethod
    def from_map(cls, copied: Tensor, num_copies: int, has_every_row: bool) -> "RowCopies":
        """Describe the copies that a map asks for. Nothing waits for the device.

        Args:
            copied: bool [rows, targets].
            num_copies: the number of True elements.
            has_every_row: whether every row is known to have a copy.
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
        """Describe one copy of each row; rows: int64 [rows], the row that each copy is of."""
        numbers = torch.arange(len(rows), device=rows.device)
        order = torch.empty_like(rows).scatter(0, rows, numbers)
        return cls(rows, torch.zeros_like(rows), order, numbers, is_permutation=True)

    def copy_rows(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy rows [rows, features] to [copies, features], without a gradient; write into `out` if it is given."""
        if out is not None:
            return torch.index_select(values, 0, self.rows, out=out)
        return _gather_rows(values, self.rows)

    def copy_rows_with_gradient(self, values: Tensor) -> Tensor:
        """Copy rows [rows, features] to [copies, features]; the gradient is `sum_copies`."""
        return _LinearMap.apply(values, self.copy_rows, self.sum_copies)

    def sum_copies(self, copies: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum the copies [copies, features] of each row in the order of their targets: [rows, features].

        Args:
            copies: the values of the copies.
            out: memory for the result; used for a permutation only, other sums allocate their result.
        """
        if self.is_permutation:
            if out is not None:
                return torch.index_select(copies, 0, self.order, out=out)
            return _gather_rows(copies, self.order)
        if len(self.order) == 0:
            return copies.new_zeros(len(self.offsets), *copies.shape[1:])
        return embedding_bag(self.order, copies, self.offsets, mode="sum")


class RowBuffers:
    """Reuses host memory for rows that live only during one call of `RowExchange`.

    On a CPU, allocating fresh memory pages costs several times as much as copying the rows. CUDA's allocator reuses
    memory itself, so buffers on other devices are allocated anew.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def get(self, use: str, like: Tensor, num_rows: int) -> Tensor:
        """Return uninitialized memory [num_rows, features] with features, dtype and device of `like`.

        Args:
            use: the purpose; memory for the same purpose is overwritten.
            like: [rows, features].
            num_rows: the number of rows.
        """
        shape = (num_rows, *like.shape[1:])
        if not is_on_cpu(like):
            return like.new_empty(shape)
        key = (use, like.dtype, like.shape[1:])
        if key not in self._buffers or len(self._buffers[key]) < num_rows:
            self._buffers[key] = like.new_empty(shape)
        return self._buffers[key][:num_rows]


@dataclass(frozen=True)
class RowExchange:
    """Sends rows to other ranks and sums of their copies back. Each direction is the gradient of the other.

    - `dispatch`: copy rows for each rank, all-to-all, copy the received rows to the local experts.
    - `combine`: add the copies of each received row, all-to-all back, add the copies of each row.

    Attributes:
        group: the ranks.
        buffers: memory for rows on their way.
        to_ranks: copies of this rank's rows, with ranks as targets.
        rows_to: the number of rows sent to each rank.
        rows_from: the number of rows received from each rank.
        to_local_experts: copies of the received rows, with local experts as targets; None: keep the received rows.
    """

    group: ProcessGroup
    buffers: RowBuffers
    to_ranks: RowCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    to_local_experts: RowCopies | None = None

    def dispatch(self, values: Tensor) -> Tensor:
        """Send rows [rows, features]; return [received copies, features]."""
        return _LinearMap.apply(values, self._dispatch, self._combine)

    def combine(self, values: Tensor) -> Tensor:
        """Send copies [received copies, features] back; return sums [rows, features]."""
        return _LinearMap.apply(values, self._combine, self._dispatch)

    def _dispatch(self, values: Tensor) -> Tensor:
        """Compute `dispatch` without a gradient."""
        sending = self.to_ranks.copy_rows(values, out=self.buffers.get("send", values, sum(self.rows_to)))
        num_received = sum(self.rows_from)
        if self.to_local_experts is None:
            # The caller keeps the received rows, so they must not be in a buffer.
            received = values.new_empty(num_received, *values.shape[1:])
            return self._all_to_all(received, sending, self.rows_from, self.rows_to)
        received = self.buffers.get("receive", values, num_received)
        return self.to_local_experts.copy_rows(self._all_to_all(received, sending, self.rows_from, self.rows_to))

    def _combine(self, values: Tensor) -> Tensor:
        """Compute `combine` without a gradient."""
        sending = values
        if self.to_local_experts is not None:
            out = self.buffers.get("send", values, sum(self.rows_from))
            sending = self.to_local_experts.sum_copies(values, out=out)
        received = self.buffers.get("receive", values, sum(self.rows_to))
        return self.to_ranks.sum_copies(self._all_to_all(received, sending, self.rows_to, self.rows_from))

    def _all_to_all(
        self, received: Tensor, sending: Tensor, rows_from: tuple[int, ...], rows_to: tuple[int, ...]
    ) -> Tensor:
        """Exchange rows between the ranks; return `received`."""
        if self.group.size() == 1:
            return received.copy_(sending)
        torch.distributed.all_to_all_single(received, sending, list(rows_from), list(rows_to), group=self.group)
        return received


class _LinearMap(torch.autograd.Function):
    """Applies a linear map of rows; the gradient is its transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, apply: RowMap, transpose: RowMap) -> Tensor:
        ctx.transpose = transpose
        return apply(values.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(gradients[0].contiguous()), None, None


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether a tensor is in host memory, where the fastest operations are other ones than on a GPU."""
    return tensor.device.type == "cpu"


def _gather_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return `values[rows]`, [copies, features]."""
    if not is_on_cpu(values) or len(rows) == 0:
        return values.index_select(0, rows)
    # On a CPU, the kernel of `embedding_bag` prefetches rows, so it is faster than `index_select`.
    return embedding_bag(rows, values, torch.arange(len(rows)), mode="sum")
