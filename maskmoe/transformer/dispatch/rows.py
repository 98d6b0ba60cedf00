"""Copies of rows, sums of copies, and all-to-alls of rows: the parts of one-copy and planned dispatch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import embedding_bag

from maskmoe.transformer.kernels import launching

RowMap = Callable[[Tensor], Tensor]


class RowBuffers:
    """Reuses host memory for rows that live only until the next rows for the same purpose.

    On a CPU, allocating fresh memory pages costs several times as much as copying the rows. CUDA's allocator reuses
    memory itself, so buffers on other devices are allocated anew. If autograd saves rows of a buffer and the buffer is
    overwritten before the backward pass, autograd raises an error.
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
class RowCopies(ABC):
    """Describes copies of rows for targets. Copies are ordered by target, then by row.

    Attributes:
        source: integers [copies], the element of the flattened map that asks for each copy, see `copies_of_map`.
    """

    source: Tensor

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """The number of rows."""

    @property
    @abstractmethod
    def first_copies(self) -> Tensor:
        """The position of the first copy of each row, integers [rows]; meaningful if every row has a copy."""

    @abstractmethod
    def copy_rows(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy rows [rows, features] to [copies, features], without a gradient; write into `out` if it is given."""

    @abstractmethod
    def sum_copies(self, copies: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum the copies [copies, features] of each row by target, without a gradient: [rows, features].

        Args:
            copies: the values of the copies.
            out: memory that the result may use.
        """

    def copy_rows_with_gradient(self, values: Tensor, buffers: RowBuffers | None) -> Tensor:
        """Copy rows as `copy_rows` does; the gradient is the sum of the copies' gradients."""
        return _LinearMap.apply(values, self.copy_rows, self._sum_into(buffers))

    def sum_copies_with_gradient(self, copies: Tensor, buffers: RowBuffers | None) -> Tensor:
        """Sum copies as `sum_copies` does; the result may be in a buffer."""
        return _LinearMap.apply(copies, self._sum_into(buffers), self.copy_rows)

    def pick(self, values: Tensor, num_copies: int | None = None) -> Tensor:
        """Pick the value [copies, features] of each copy from the values [rows, columns, features] of the map.

        Args:
            values: the values.
            num_copies: the number of copies, if there is room for more.
        """
        return values.flatten(0, 1).index_select(0, self.source[:num_copies])

    def _sum_into(self, buffers: RowBuffers | None) -> RowMap:
        """Return `sum_copies` with its result in a buffer if there are buffers."""
        if buffers is None:
            return self.sum_copies
        return lambda copies: self.sum_copies(copies, buffers.get("sum", copies, self.num_rows))


def copies_of_map(
    chosen: Tensor, num_copies: int, max_copies: int, columns: slice = slice(None), has_every_row: bool = False
) -> RowCopies:
    """Describe the copies that a map asks for. Nothing waits for the device.

    Args:
        chosen: bool [rows, columns], contiguous.
        num_copies: the number of True elements; where kernels run, a larger number is allowed, too.
        max_copies: the largest possible number of copies of a row.
        columns: the columns that are targets.
        has_every_row: whether every row is known to have a copy.
    """
    if launching.runs_kernels(chosen):
        from maskmoe.transformer.kernels.row_copies import SlottedCopies

        return SlottedCopies.from_map(chosen, num_copies, max_copies, columns)
    return SortedCopies.from_map(chosen, num_copies, columns, has_every_row)


@dataclass(frozen=True)
class SortedCopies(RowCopies):
    """Copies rows by index, and sums copies that a sort has brought into the order of the rows.

    Attributes:
        rows: int64 [copies], the row that each copy is of.
        order: int64 [copies], the copies ordered by row, then by target.
        offsets: int64 [rows], where the copies of each row begin in `order`.
        is_permutation: whether every row has exactly one copy.
    """

    rows: Tensor
    order: Tensor
    offsets: Tensor
    is_permutation: bool

    @classmethod
    def from_map(cls, chosen: Tensor, num_copies: int, columns: slice, has_every_row: bool) -> "SortedCopies":
        """Describe the copies that a map asks for; see `copies_of_map`."""
        num_rows, row_size = chosen.shape
        first, _, _ = columns.indices(row_size)
        targets, rows = torch.nonzero_static(chosen[:, columns].t(), size=num_copies).unbind(1)
        copies_of_row = chosen[:, columns].sum(dim=1)
        return cls(
            source=rows * row_size + targets + first,
            rows=rows,
            order=rows.argsort(stable=True),
            offsets=copies_of_row.cumsum(0) - copies_of_row,
            is_permutation=has_every_row and num_copies == num_rows,
        )

    @classmethod
    def permutations(cls, rows: Tensor) -> list["SortedCopies"]:
        """Describe one copy of each row, in several ways; rows: int64 [ways, rows], the row that each copy is of."""
        numbers = torch.arange(rows.shape[1], device=rows.device)
        orders = torch.empty_like(rows).scatter_(1, rows, numbers.expand_as(rows))
        return [cls(way, way, order, numbers, is_permutation=True) for way, order in zip(rows, orders, strict=True)]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return len(self.offsets)

    @property
    def first_copies(self) -> Tensor:
        """The position of the first copy of each row, int64 [rows]."""
        return self.order if self.is_permutation else self.order.index_select(0, self.offsets)

    def copy_rows(self, values: Tensor, out: Tensor | None = None) -> Tensor:
        """Copy rows; see `RowCopies`."""
        return _gather_rows(values, self.rows, out)

    def sum_copies(self, copies: Tensor, out: Tensor | None = None) -> Tensor:
        """Sum copies; see `RowCopies`. Only the sums of a permutation use `out`."""
        if self.is_permutation:
            return _gather_rows(copies, self.order, out)
        if len(self.order) == 0:
            return copies.new_zeros(len(self.offsets), *copies.shape[1:])
        # On a CPU, `embedding_bag` cuts off the bits that a sum of bf16 numbers has too many, so add in fp32 and round.
        truncates = is_on_cpu(copies) and copies.dtype == torch.bfloat16
        terms = copies.float() if truncates else copies
        return embedding_bag(self.order, terms, self.offsets, mode="sum").to(copies.dtype)


class RowCounts(Protocol):
    """The numbers of rows that the ranks of a group exchange, on the host."""

    @property
    def rows_to(self) -> tuple[int, ...]:
        """The number of rows sent to each rank."""
        ...

    @property
    def rows_from(self) -> tuple[int, ...]:
        """The number of rows received from each rank."""
        ...


@dataclass(frozen=True)
class RowExchange:
    """Sends rows to other ranks and back. Each direction is the gradient of the other.

    Attributes:
        group: the ranks.
        buffers: memory for rows on their way.
        to_ranks: copies of this rank's rows, with ranks as targets.
        counts: the numbers of rows. They are read as late as possible, because the host may have to wait for them.
    """

    group: ProcessGroup
    buffers: RowBuffers
    to_ranks: RowCopies
    counts: RowCounts

    def dispatch(self, values: Tensor) -> Tensor:
        """Copy rows [rows, features] for each rank, and all-to-all; return [received rows, features] in a buffer."""
        return _LinearMap.apply(values, self._dispatch, self._combine)

    def combine(self, values: Tensor) -> Tensor:
        """All-to-all of [received rows, features] back, and add the copies of each row: [rows, features]."""
        return _LinearMap.apply(values, self._combine, self._dispatch)

    def _dispatch(self, values: Tensor) -> Tensor:
        """Compute `dispatch` without a gradient."""
        sending = self.to_ranks.copy_rows(values, self.buffers.get("send", values, len(self.to_ranks.source)))
        return self._all_to_all(sending[: sum(self.counts.rows_to)], self.counts.rows_to, self.counts.rows_from)

    def _combine(self, values: Tensor) -> Tensor:
        """Compute `combine` without a gradient."""
        return self.to_ranks.sum_copies(self._all_to_all(values, self.counts.rows_from, self.counts.rows_to))

    def _all_to_all(self, sending: Tensor, rows_to: tuple[int, ...], rows_from: tuple[int, ...]) -> Tensor:
        """Exchange rows between the ranks; return the received rows in a buffer."""
        received = self.buffers.get("receive", sending, sum(rows_from))
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


def _gather_rows(values: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
    """Return `values[rows]`, [copies, features], in `out` if it is given."""
    if out is not None:
        return torch.index_select(values, 0, rows, out=out)
    if not is_on_cpu(values) or len(rows) == 0:
        return values.index_select(0, rows)
    # On a CPU, the kernel of `embedding_bag` prefetches rows, so it is faster than `index_select`.
    return embedding_bag(rows, values, torch.arange(len(rows)), mode="sum")
