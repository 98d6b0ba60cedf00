"""Plans of dispatch: under a rank-local mask, token ids tell every destination before the first layer runs."""

from collections.abc import Iterable

import numpy as np
import torch
from megatron.core.utils import get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.all_to_all import RowExchange
from maskmoe.transformer.dispatch.rows import KnownExperts, LayerPlan, RowCopies
from maskmoe.transformer.token_ids import DispatchPlan, TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts


class DispatchPlanner:
    """Makes plans under a rank-local mask, where the destination of a token is a function of its id alone.

    The plan of a table also has the number of rows of each expert if no id sees more than k experts. If every id sees
    one expert, the plan orders the rows by expert.

    `tables` are those that the stage's layers use.
    """

    def __init__(
        self, visible_experts: VisibleExperts, topk: int, tables: Iterable[int], ep_group: ProcessGroup
    ) -> None:
        self._visible_experts = visible_experts
        self._topk = topk
        self._tables = tuple(sorted(set(tables)))
        self._group = ep_group
        self._num_ranks = get_pg_size(ep_group)
        max_visible = visible_experts.max_visible
        self._is_single = [max_visible[table] == 1 for table in self._tables]
        self._is_exact = [max_visible[table] <= topk for table in self._tables]

    def plan(self, token_ids: TokenIds) -> DispatchPlan:
        """Plan a micro-batch of ids [batch, sequence]; a collective call. The host waits once, for all counts."""
        token_ids = token_ids.transpose()
        ids, is_real = token_ids.ids.flatten(), token_ids.is_real
        tables = torch.tensor(self._tables).to(ids.device, non_blocking=True)
        first_expert, num_visible = self._visible_experts.first_and_size(ids, tables)  # [tables, tokens] each
        destination = first_expert // (self._visible_experts.num_experts // self._num_ranks)

        # Count the rows for each rank and the selected experts, and exchange the counts.
        ones = torch.ones_like(ids).expand_as(destination)
        num_rows = _count(destination, ones, self._num_ranks)
        selected = self._count_selected(ids, first_expert, num_visible)
        counts = torch.cat([num_rows.unsqueeze(-1), selected.unflatten(1, (self._num_ranks, -1))], dim=-1)
        sent = counts.transpose(0, 1).contiguous()  # [ranks, tables, 1 + local experts]
        received = sent.clone()
        if self._num_ranks > 1:
            torch.distributed.all_to_all_single(received, sent, group=self._group)
        real = selected if is_real is None else _count(first_expert, is_real.long().expand_as(ones), selected.shape[1])
        sent, received, real = _to_host(sent, received, real)

        plans = {}
        for index, table in enumerate(self._tables):
            key = first_expert[index] if self._is_single[index] else destination[index]
            rows = key.argsort(stable=True)
            of_experts = received[:, index, 1:]  # [ranks, local experts]
            plans[table] = LayerPlan(
                to_ranks=RowCopies.permutation(rows, rows * self._num_ranks + destination[index][rows]).copy,
                exchange=RowExchange(
                    self._group, tuple(sent[:, index, 0].tolist()), tuple(received[:, index, 0].tolist())
                ),
                num_selected=int(of_experts.sum()),
                tokens_per_expert=of_experts.sum(dim=0) if self._is_exact[index] else None,
                experts=_known_experts(of_experts, real[index], ids.device) if self._is_single[index] else None,
            )
        return plans

    def _count_selected(self, ids: Tensor, first_expert: Tensor, num_visible: Tensor) -> Tensor:
        """Count the selected experts: int64 [tables, experts].

        A table in which some id sees more than k experts has the right sum for each rank only.
        """
        num_experts = self._visible_experts.num_experts
        selected = _count(first_expert, num_visible.clamp(max=self._topk), num_experts)
        for index, table in enumerate(self._tables):
            if self._is_exact[index] and not self._is_single[index]:
                selected[index] = self._visible_experts.mask_table(table).look_up(ids).experts.sum(dim=0)
        return selected


def _count(targets: Tensor, values: Tensor, num_targets: int) -> Tensor:
    """Add up values by target: int64 [tables, tokens] both, the result is [tables, targets]."""
    return targets.new_zeros(len(targets), num_targets).scatter_add(1, targets, values)


def _to_host(*tensors: Tensor) -> list[Tensor]:
    """Copy tensors of one dtype to the host in one transfer."""
    on_host = torch.cat([each.flatten() for each in tensors]).cpu().split([each.numel() for each in tensors])
    return [copied.view(each.shape) for copied, each in zip(on_host, tensors, strict=True)]


def _known_experts(received: Tensor, real: Tensor, device: torch.device) -> KnownExperts:
    """Describe a table in which every id sees one expert.

    Args:
        received: [ranks, local experts], the rows received from each rank for each expert, in this order.
        real: [experts], this rank's tokens without padding, by expert.
        device: The device of the received rows.
    """
    statistics = torch.cat([real.sum().view(1), real.new_zeros(2), real]).double()
    if received.shape[1] == 1:
        return KnownExperts(None, statistics)
    counts = received.numpy()
    starts = (counts.cumsum() - counts.flatten()).reshape(counts.shape).T.flatten()
    sizes = counts.T.flatten()
    rows = np.repeat(starts - sizes.cumsum() + sizes, sizes) + np.arange(sizes.sum())
    by_expert = torch.from_numpy(rows).to(device, non_blocking=True)
    return KnownExperts(RowCopies.permutation(by_expert, by_expert), statistics)
