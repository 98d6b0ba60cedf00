"""Copies of rows and sums of copies, plans of their exchange, and their way to the experts."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from torch import Tensor
from torch.nn.functional import embedding_bag

from maskmoe.transformer.dispatch.all_to_all import RowExchange

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
    def from_map(cls, chosen: Tensor, num_copies: int, has_every_row: bool = False) -> "RowCopies":
        """Describe the copies that a map asks for. Nothing waits for the device.

        Args:
            chosen: Bool [rows, targets].
            num_copies: The number of True elements.
            has_every_row: Whether every row is known to have a copy.
        """
        num_rows, num_targets = chosen.shape
        by_target = chosen.t()
        targets, rows = torch.nonzero_static(by_target, size=num_copies).unbind(1)
        source = rows * num_targets + targets
        if has_every_row and num_copies == num_rows:
            return cls.permutation(rows, source)
        # Number the copies, and list the numbers by row.
        number = by_target.flatten().cumsum(0).sub_(1).view_as(by_target)
        rows_of_order, targets_of_order = torch.nonzero_static(chosen, size=num_copies).unbind(1)
        copies_of_row = chosen.sum(dim=1)
        return cls(
            source=source,
            rows=rows,
            order=number[targets_of_order, rows_of_order],
            offsets=copies_of_row.cumsum(0) - copies_of_row,
            is_permutation=False,
        )

    @classmethod
    def permutation(cls, rows: Tensor, source: Tensor) -> "RowCopies":
        """Describe one copy of each row; int64 [rows]: the row at each position, and its `source`."""
        numbers = torch.arange(len(rows), device=rows.device)
        order = torch.empty_like(rows).scatter_(0, rows, numbers)
        return cls(source, rows, order, numbers, is_permutation=True)

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

    def copy(self, rows: Tensor) -> "CopiedRows":
        """Copy rows [rows, features]; the value of each copy is its `source`."""
        return CopiedRows(
            copies=_LinearMap.apply(rows, self.copy_rows, self.sum_copies),
            values=self.source,
            sum_copies=lambda copies: _LinearMap.apply(copies, self.sum_copies, self.copy_rows),
        )


@dataclass(frozen=True)
class CopiedRows:
    """Copies of rows, ordered by target, then by row.

    Attributes:
        copies: [copies, features]; the gradient of a row is the sum of its copies' gradients.
        values: [copies], a value of each copy, see `CopyRows`.
        sum_copies: Adds up what became of the copies [copies, features] of each row: [rows, features].
    """

    copies: Tensor
    values: Tensor
    sum_copies: RowMap


class CopyRows:
    """Copies rows to ranks or to experts, by Transformer Engine's kernels if `--moe-permute-fusion` asks for them.

    Arguments of both methods:
        rows: [rows, features].
        chosen: Bool [rows, targets], the targets of each row.
        num_copies: The number of True elements of `chosen`.
    """

    def __init__(self, uses_transformer_engine: bool) -> None:
        self._uses_transformer_engine = uses_transformer_engine

    def to_ranks(self, rows: Tensor, chosen: Tensor, num_copies: int) -> CopiedRows:
        """Copy each row to its ranks; values are int64 indices of the flattened map `chosen`."""
        # Transformer Engine's kernels need at least one copy.
        if not self._uses_transformer_engine or num_copies == 0:
            return RowCopies.from_map(chosen, num_copies).copy(rows)
        # The kernel writes zeros in place of a row whose value is 0, so count from 1.
        indices = torch.arange(1, chosen.numel() + 1, device=rows.device).view_as(chosen)
        copied = _permute(rows, indices, chosen, num_copies)
        return replace(copied, values=copied.values - 1)

    def to_experts(self, rows: Tensor, weights: Tensor, chosen: Tensor, num_copies: int) -> CopiedRows:
        """Copy each row to its local experts, at least one; values are those of `weights` [rows, local experts]."""
        if chosen.shape[1] == 1:
            return CopiedRows(rows, weights.squeeze(1), sum_copies=lambda outputs: outputs)
        if self._uses_transformer_engine and num_copies > 0:
            return _permute(rows, weights, chosen, num_copies)
        copied = RowCopies.from_map(chosen, num_copies, has_every_row=True).copy(rows)
        return replace(copied, values=weights.flatten().index_select(0, copied.values))


def _permute(rows: Tensor, values: Tensor, chosen: Tensor, num_copies: int) -> CopiedRows:
    """Copy rows, and the value of each row and target, by Transformer Engine."""
    permute, unpermute = moe_utils.fused_permute_with_probs, moe_utils.fused_unpermute
    assert permute is not None
    assert unpermute is not None
    copies, values, row_id_map = permute(rows, values, chosen, num_out_tokens=num_copies)
    return CopiedRows(copies, values, partial(unpermute, row_id_map=row_id_map, restore_shape=rows.shape))


@dataclass(frozen=True)
class KnownExperts:
    """The order of the rows and the counts of a layer in which every id sees one expert; both follow from the ids.

    Attributes:
        by_expert: Orders the received rows by local expert; None if there is one local expert.
        statistics: Float64 [3 + experts] on the host, the result of `sum_tokens` for this rank's tokens.
    """

    by_expert: RowCopies | None
    statistics: Tensor


@dataclass(frozen=True)
class LayerPlan:
    """How the tokens of a micro-batch travel in a layer.

    Attributes:
        to_ranks: Copies this rank's tokens, with expert-parallel ranks as targets; the values are indices of the
            flattened map [tokens, ranks].
        exchange: Sends the copies.
        num_selected: The number of experts that are selected for the received rows.
        tokens_per_expert: Int64 [local experts] on the host; None if not known there.
        experts: The experts of the tokens; None if a router chooses the experts.
    """

    to_ranks: Callable[[Tensor], CopiedRows]
    exchange: RowExchange
    num_selected: int
    tokens_per_expert: Tensor | None
    experts: KnownExperts | None = None


class _LinearMap(torch.autograd.Function):
    """Applies a linear map of rows; the gradient is its transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, apply: RowMap, transpose: RowMap) -> Tensor:
        ctx.transpose = transpose
        return apply(values.contiguous())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(gradients[0].contiguous()), None, None
