"""Copies of rows, sums of copies, and all-to-alls of rows: the parts of all dispatchers but the stock one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Size, Tensor
from torch.distributed import ProcessGroup, Work
from torch.nn.functional import embedding_bag

RowMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RowCopies:
    """Describes copies of rows for targets. Copies are ordered by target, then by row.

    Attributes:
        source: Int64 [copies], the element of the flattened map that asks for each copy, see `from_map`.
        rows: Int64 [copies], the row that each copy is of.
        order: Int64 [copies], the copies ordered by row, then by target.
        offsets: Int64 [rows], where the copies of each row begin in `order`.
        is_permutation: Whether every row has exactly one copy.
    """

    source: Tensor
    rows: Tensor
    order: Tensor
    offsets: Tensor
    is_permutation: bool

    @classmethod
    def from_map(
        cls, chosen: Tensor, num_copies: int, columns: slice = slice(None), has_every_row: bool = False
    ) -> "RowCopies":
        """Describe the copies that a map asks for. Nothing waits for the device.

        Args:
            chosen: Bool [rows, columns].
            num_copies: The number of True elements.
            columns: The columns that are targets.
            has_every_row: Whether every row is known to have a copy.
        """
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
    def permutations(cls, rows: Tensor) -> list["RowCopies"]:
        """Describe reorderings of all rows; rows: int64 [reorderings, rows], the row at each position."""
        numbers = torch.arange(rows.shape[1], device=rows.device)
        orders = torch.empty_like(rows).scatter_(1, rows, numbers.expand_as(rows))
        return [cls(each, each, order, numbers, is_permutation=True) for each, order in zip(rows, orders, strict=True)]

    def copy_rows(self, values: Tensor) -> Tensor:
        """Copy rows [rows, features] to [copies, features], without a gradient."""
        return values.index_select(0, self.rows)

    def sum_copies(self, copies: Tensor) -> Tensor:
        """Sum the copies [copies, features] of each row by target, without a gradient: [rows, features]."""
        if self.is_permutation:
            return copies.index_select(0, self.order)
        if len(self.order) == 0:
            return copies.new_zeros(len(self.offsets), *copies.shape[1:])
        # On a CPU, `embedding_bag` cuts off the bits that a sum of bf16 numbers has too many, so add in fp32 and round.
        truncates = copies.is_cpu and copies.dtype == torch.bfloat16
        terms = copies.float() if truncates else copies
        return embedding_bag(self.order, terms, self.offsets, mode="sum").to(copies.dtype)

    def copy_rows_with_gradient(self, values: Tensor) -> Tensor:
        """Copy rows as `copy_rows` does; the gradient is the sum of the copies' gradients."""
        return _LinearMap.apply(values, self.copy_rows, self.sum_copies)

    def sum_copies_with_gradient(self, copies: Tensor) -> Tensor:
        """Sum copies as `sum_copies` does; the gradient is a copy for each copy."""
        return _LinearMap.apply(copies, self.sum_copies, self.copy_rows)

    def pick(self, values: Tensor) -> Tensor:
        """Pick the value [copies, features] of each copy from the values [rows, columns, features] of the map."""
        return values.flatten(0, 1).index_select(0, self.source)


@dataclass(frozen=True)
class RowExchange:
    """Sends rows to other ranks and back. Each direction is the gradient of the other.

    Attributes:
        group: The ranks.
        to_ranks: Copies of this rank's rows, with ranks as targets.
        rows_to: The number of rows sent to each rank.
        rows_from: The number of rows received from each rank.
    """

    group: ProcessGroup
    to_ranks: RowCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]

    def dispatch(self, values: Tensor) -> "SentRows":
        """Copy rows [rows, features] for each rank, and start their all-to-all."""
        in_flight: list[_AllToAll] = []
        rows = _Send.apply(values, self, in_flight)
        return SentRows(rows, self, in_flight, has_gradient=values.requires_grad)

    def combine(self, values: Tensor) -> Tensor:
        """All-to-all of [received rows, features] back, and add the copies of each row: [rows, features]."""
        return _LinearMap.apply(
            values,
            lambda values: self.finish_combine(self.start_combine(values)),
            lambda gradients: self.start_dispatch(gradients).wait(),
        )

    def start_dispatch(self, values: Tensor) -> "_AllToAll":
        """Copy rows for each rank and start their all-to-all, without a gradient."""
        return _AllToAll(self.to_ranks.copy_rows(values), self.rows_from, self.rows_to, self.group)

    def start_combine(self, values: Tensor) -> "_AllToAll":
        """Start the all-to-all of received rows back, without a gradient."""
        return _AllToAll(values, self.rows_to, self.rows_from, self.group)

    def finish_combine(self, all_to_all: "_AllToAll") -> Tensor:
        """Wait for an all-to-all that `start_combine` started, and add the copies of each row."""
        return self.to_ranks.sum_copies(all_to_all.wait())


class _AllToAll:
    """An all-to-all of rows that has been started; the memory of the rows must not be used before `wait`."""

    def __init__(
        self, sending: Tensor, rows_from: tuple[int, ...], rows_to: tuple[int, ...], group: ProcessGroup
    ) -> None:
        self.received = sending.new_empty(sum(rows_from), *sending.shape[1:])
        self._sending = sending  # keeps the memory
        self._work: Work | None = None
        if group.size() == 1:
            self.received.copy_(sending)
        else:
            self._work = torch.distributed.all_to_all_single(
                self.received, sending, list(rows_from), list(rows_to), group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """Wait for the rows, and return them."""
        if self._work is not None:
            self._work.wait()
        return self.received


@dataclass(frozen=True)
class SentRows:
    """Rows that travel to other ranks, while the caller computes something else.

    In the backward pass, `receive` starts the all-to-all of the gradients, and `RowExchange.dispatch` waits for the
    result. In between, autograd runs the backward pass of what was computed while the rows travelled, because
    autograd runs the operations of a backward pass in the reverse order of the forward pass.

    Attributes:
        rows: [received rows, features]; the values must not be read before `receive`.
        exchange: Sent the rows.
        in_flight: The all-to-all of the rows, or of their gradients, while it runs; else empty.
        has_gradient: Whether the sent rows need a gradient.
    """

    rows: Tensor
    exchange: RowExchange
    in_flight: list[_AllToAll]
    has_gradient: bool

    def receive(self, rows: Tensor) -> Tensor:
        """Wait for the rows; `rows` is `self.rows`, to which losses may be attached."""
        return _Receive.apply(rows, self.exchange, self.in_flight, self.has_gradient)


@dataclass(frozen=True)
class ExpertRows:
    """The rows of this rank's experts.

    Attributes:
        values: [copies, features], the received rows copied to their experts, by expert.
        weights: [copies].
        sum_outputs: Adds up the experts' outputs [copies, features] of each received row: [rows, features].
    """

    values: Tensor
    weights: Tensor
    sum_outputs: RowMap


class CopyToExperts:
    """Copies received rows to this rank's experts.

    Transformer Engine's fused permutation copies the rows if `--moe-permute-fusion` asks for it.
    """

    def __init__(self, experts: slice, uses_transformer_engine: bool) -> None:
        self._experts = experts
        self._uses_transformer_engine = uses_transformer_engine

    def __call__(self, rows: Tensor, weights: Tensor, chosen: Tensor, num_copies: int) -> ExpertRows:
        """Copy each row to the experts that are chosen for it.

        Args:
            rows: [rows, features]. Every row has an expert on this rank.
            weights: [rows, experts].
            chosen: Bool [rows, experts].
            num_copies: The number of chosen experts of this rank.
        """
        # Transformer Engine's kernels need at least one copy.
        if self._uses_transformer_engine and num_copies > 0:
            permute, unpermute = moe_utils.fused_permute_with_probs, moe_utils.fused_unpermute
            assert permute is not None
            assert unpermute is not None
            values, weights_of_copies, row_id_map = permute(
                rows, weights[:, self._experts], chosen[:, self._experts], num_out_tokens=num_copies
            )
            sum_outputs = partial(unpermute, row_id_map=row_id_map, restore_shape=rows.shape)
            return ExpertRows(values, weights_of_copies, sum_outputs)
        copies = RowCopies.from_map(chosen, num_copies, self._experts, has_every_row=True)
        return ExpertRows(
            values=copies.copy_rows_with_gradient(rows),
            weights=copies.pick(weights),
            sum_outputs=copies.sum_copies_with_gradient,
        )


@dataclass(frozen=True)
class DispatchRecord:
    """Records one layer's dispatch so that `combine` can invert it.

    Attributes:
        sum_outputs: See `ExpertRows`.
        shape: [sequence, batch, features].
        exchange: Brought the tokens from other ranks; None if the tokens were here.
    """

    sum_outputs: RowMap
    shape: Size
    exchange: RowExchange | None = None

    def combine(self, expert_output: Tensor) -> Tensor:
        """Add up the outputs [copies, features] of each token: [sequence, batch, features]."""
        rows = self.sum_outputs(expert_output)
        return (rows if self.exchange is None else self.exchange.combine(rows)).view(self.shape)


class _Send(torch.autograd.Function):
    """Starts to send rows; waits for the gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, exchange: RowExchange, in_flight: list[_AllToAll]) -> Tensor:
        ctx.exchange, ctx.in_flight = exchange, in_flight
        in_flight.append(exchange.start_dispatch(values.contiguous()))
        return in_flight[-1].received

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.finish_combine(ctx.in_flight.pop()), None, None


class _Receive(torch.autograd.Function):
    """Waits for rows; starts to send the gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: RowExchange, in_flight: list[_AllToAll], has_gradient: bool
    ) -> Tensor:
        ctx.exchange, ctx.in_flight, ctx.has_gradient = exchange, in_flight, has_gradient
        in_flight.pop().wait()
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.has_gradient:
            ctx.in_flight.append(ctx.exchange.start_combine(gradients[0].contiguous()))
        # `_Send` ignores the values of this gradient, which only leads autograd to it.
        return gradients[0], None, None, None


class _LinearMap(torch.autograd.Function):
    """Applies a linear map of rows; the gradient is its transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, apply: RowMap, transpose: RowMap) -> Tensor:
        ctx.transpose = transpose
        return apply(values.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(gradients[0].contiguous()), None, None
