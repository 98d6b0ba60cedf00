"""Copies of received rows for this rank's experts, and the way back, for one-copy and planned dispatch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Size, Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.rows import RowBuffers, RowExchange, copies_of_map


@dataclass(frozen=True)
class ExpertRows:
    """The rows of this rank's experts.

    Attributes:
        values: [copies, features], the received rows copied to the experts that are chosen for them, by expert.
        weights: [copies].
        first_copies: integers [rows], the position of one copy of each received row.
        sum_outputs: adds up the experts' outputs [copies, features] of each received row: [rows, features].
    """

    values: Tensor
    weights: Tensor
    first_copies: Tensor
    sum_outputs: Callable[[Tensor], Tensor]


class CopyToExperts:
    """Copies received rows to this rank's experts.

    Args:
        experts: this rank's experts.
        topk: k.
        buffers: memory for rows that are consumed at once; None: new memory.
        uses_transformer_engine: copy by Transformer Engine's fused permutation, as `--moe-permute-fusion` asks.
    """

    def __init__(self, experts: slice, topk: int, buffers: RowBuffers | None, uses_transformer_engine: bool) -> None:
        self._experts = experts
        self._max_copies = min(topk, experts.stop - experts.start)
        self._buffers = buffers
        self._uses_transformer_engine = uses_transformer_engine

    def __call__(self, rows: Tensor, weights: Tensor, chosen: Tensor, num_copies: int) -> ExpertRows:
        """Copy each row to the experts that are chosen for it.

        Args:
            rows: [rows, features]. Every row has an expert on this rank.
            weights: [rows, experts].
            chosen: bool [rows, experts].
            num_copies: the number of chosen experts of this rank.
        """
        # Transformer Engine's kernels need at least one copy.
        if self._uses_transformer_engine and num_copies > 0:
            return self._copy_by_transformer_engine(
                rows, weights[:, self._experts], chosen[:, self._experts], num_copies
            )
        copies = copies_of_map(chosen, num_copies, self._max_copies, self._experts, has_every_row=True)
        return ExpertRows(
            values=copies.copy_rows_with_gradient(rows, self._buffers),
            weights=copies.pick(weights),
            first_copies=copies.first_copies,
            sum_outputs=lambda outputs: copies.sum_copies_with_gradient(outputs, self._buffers),
        )

    def _copy_by_transformer_engine(self, rows: Tensor, weights: Tensor, chosen: Tensor, num_copies: int) -> ExpertRows:
        """Copy each row by Megatron-Core's name for Transformer Engine's permutation."""
        permute, unpermute = moe_utils.fused_permute_with_probs, moe_utils.fused_unpermute
        assert permute is not None
        assert unpermute is not None
        values, of_copies, row_id_map = permute(rows, weights, chosen, num_out_tokens=num_copies)
        return ExpertRows(
            values,
            of_copies,
            first_copies=row_id_map[:, 0],  # Each row of the map begins with the positions of the row's copies.
            sum_outputs=partial(unpermute, row_id_map=row_id_map, restore_shape=rows.shape),
        )


@dataclass(frozen=True)
class WayBack:
    """How the experts' outputs come back to the tokens.

    Attributes:
        exchange: brought the tokens.
        sum_outputs: see `ExpertRows`.
        shape: [sequence, batch, hidden].
    """

    exchange: RowExchange
    sum_outputs: Callable[[Tensor], Tensor]
    shape: Size

    def combine(self, expert_output: Tensor) -> Tensor:
        """Add up the outputs [copies, hidden] of each token: [sequence, batch, hidden]."""
        return self.exchange.combine(self.sum_outputs(expert_output)).view(self.shape)


class SavedByExperts:
    """Keeps autograd from saving received rows a second time for the router: the experts save copies of the rows.

    The backward pass of the router's linear layer reads the rows from their first copies.

    Args:
        rows: [rows, features].
    """

    def __init__(self, rows: Tensor) -> None:
        self._address, self._size = rows.data_ptr(), rows.numel()
        self._copies: Tensor | None = None
        self._first_copies: Tensor | None = None

    def while_routing(self) -> AbstractContextManager[Any]:
        """Return a context in which autograd does not save the rows."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def keep(self, expert_rows: ExpertRows) -> None:
        """Set the copies to read the rows from."""
        self._copies, self._first_copies = expert_rows.values.detach(), expert_rows.first_copies

    def _pack(self, tensor: Tensor) -> Any:
        """Return the shape of the rows in place of the rows, and any other tensor as it is."""
        is_rows = 0 < tensor.numel() == self._size and tensor.data_ptr() == self._address
        return tensor.shape if is_rows else tensor

    def _unpack(self, packed: Any) -> Tensor:
        """Return the tensor that was packed."""
        if isinstance(packed, Tensor):
            return packed
        assert self._copies is not None
        assert self._first_copies is not None
        return self._copies.index_select(0, self._first_copies).view(packed)


def local_experts(config: TransformerConfig, ep_group: ProcessGroup) -> slice:
    """Return the experts of this rank."""
    assert config.num_moe_experts is not None
    num_local_experts = config.num_moe_experts // ep_group.size()
    first = ep_group.rank() * num_local_experts
    return slice(first, first + num_local_experts)
