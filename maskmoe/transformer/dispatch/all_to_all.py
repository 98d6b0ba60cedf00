"""All-to-alls of rows, forward and backward, which run while something else is computed."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup, Work


@dataclass(frozen=True)
class RowExchange:
    """Sends rows, ordered by rank, to other ranks and back. Each direction is the gradient of the other.

    Attributes:
        group: The ranks.
        rows_to: The number of rows sent to each rank.
        rows_from: The number of rows received from each rank.
    """

    group: ProcessGroup
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]

    def send(self, rows: Tensor) -> "SentRows":
        """Start the all-to-all of rows [rows, features]."""
        in_flight: list[_AllToAll] = []
        received = _Send.apply(rows, self, in_flight)
        return SentRows(received, self, in_flight, has_gradient=rows.requires_grad)

    def send_back(self, rows: Tensor) -> Tensor:
        """Send received rows back to where they came from."""
        return all_to_all(self.group, rows, list(self.rows_to), list(self.rows_from))

    def start(self, rows: Tensor) -> "_AllToAll":
        """Start the all-to-all of rows, without a gradient."""
        return _AllToAll(rows, self.rows_from, self.rows_to, self.group)

    def start_back(self, rows: Tensor) -> "_AllToAll":
        """Start the all-to-all of received rows back, without a gradient."""
        return _AllToAll(rows, self.rows_to, self.rows_from, self.group)


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

    In the backward pass, `receive` starts the all-to-all of the gradients, and `RowExchange.send` waits for the result.
    In between, autograd runs the backward pass of what was computed while the rows travelled, because autograd runs the
    operations of a backward pass in the reverse order of the forward pass.

    Attributes:
        rows: [received rows, features]; `receive` returns the values.
        exchange: Sent the rows.
        in_flight: The all-to-all of the rows, or of their gradients, while it runs; else empty.
        has_gradient: Whether the sent rows need a gradient.
    """

    rows: Tensor
    exchange: RowExchange
    in_flight: list[_AllToAll]
    has_gradient: bool

    def receive(self) -> Tensor:
        """Wait for the rows."""
        return _Receive.apply(self.rows, self.exchange, self.in_flight, self.has_gradient)


class _Send(torch.autograd.Function):
    """Starts to send rows; waits for the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange, in_flight: list[_AllToAll]) -> Tensor:
        ctx.in_flight = in_flight
        in_flight.append(exchange.start(rows.contiguous()))
        return in_flight[-1].received

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None, None]:
        return ctx.in_flight.pop().wait(), None, None


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
            ctx.in_flight.append(ctx.exchange.start_back(gradients[0].contiguous()))
        # `_Send` ignores the values of this gradient, which only leads autograd to it.
        return gradients[0], None, None, None
