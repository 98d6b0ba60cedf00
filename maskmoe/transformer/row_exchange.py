"""All-to-alls of copies of rows, there and back, each the other's gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.row_copies import RowCopies


@dataclass(frozen=True)
class RowExchange:
    """The way of rows to other ranks and back.

    There: copy rows for each rank, all-to-all, and copy what is received. Back: add the copies of each received row,
    all-to-all, and add the copies of each row.

    Attributes:
        group: the ranks.
        sent: copies of this rank's rows by rank.
        rows_to, rows_from: rows sent to, and received from, each rank.
        fanned: copies of the received rows; None: they are taken as they are.
    """

    group: ProcessGroup
    sent: RowCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    fanned: RowCopies | None = None

    def there(self, values: Tensor) -> Tensor:
        """[rows, features] to [received copies, features]."""
        return _There.apply(values, self)

    def back(self, values: Tensor) -> Tensor:
        """[received copies, features] to [rows, features]."""
        return _Back.apply(values, self)

    def _there(self, values: Tensor) -> Tensor:
        sending = self.sent.take_into(_scratch("send", values, sum(self.rows_to)), values)
        num_received = sum(self.rows_from)
        if self.fanned is None:
            return self._all_to_all(
                values.new_empty(num_received, *values.shape[1:]), sending, self.rows_from, self.rows_to
            )
        received = _scratch("receive", values, num_received)
        return self.fanned.take_now(self._all_to_all(received, sending, self.rows_from, self.rows_to))

    def _back(self, values: Tensor) -> Tensor:
        sending = values
        if self.fanned is not None:
            sending = self.fanned.sum_into(_scratch("send", values, sum(self.rows_from)), values)
        received = _scratch("receive", values, sum(self.rows_to))
        return self.sent.sum_now(self._all_to_all(received, sending, self.rows_to, self.rows_from))

    def _all_to_all(
        self, received: Tensor, sending: Tensor, rows_from: tuple[int, ...], rows_to: tuple[int, ...]
    ) -> Tensor:
        if self.group.size() == 1:
            return received.copy_(sending)
        torch.distributed.all_to_all_single(received, sending, list(rows_from), list(rows_to), group=self.group)
        return received


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._there(values.contiguous())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._back(gradient.contiguous()), None


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._back(values.contiguous())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._there(gradient.contiguous()), None


_scratches: dict[tuple, Tensor] = {}


def _scratch(use: str, like: Tensor, num_rows: int) -> Tensor:
    """Memory [rows, features] for what lives no longer than the function that asks for it.

    Fresh pages of host memory cost several times what is done with them here. CUDA's allocator keeps its own.
    """
    shape = (num_rows, *like.shape[1:])
    if like.device.type != "cpu":
        return like.new_empty(shape)
    key = (use, like.dtype, like.shape[1:])
    if key not in _scratches or len(_scratches[key]) < num_rows:
        _scratches[key] = like.new_empty(shape)
    return _scratches[key][:num_rows]
