"""Plans of dispatch: where the tokens of a micro-batch go in every layer, computed before the first layer runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.rows import SortedCopies
from maskmoe.transformer.token_ids import TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts


@dataclass(frozen=True)
class LayerPlan:
    """How the tokens of a micro-batch travel in the layers that use one table of the routing mask.

    Attributes:
        to_ranks: one copy of each of this rank's tokens, ordered by destination rank.
        rows_to: the number of rows sent to each expert-parallel rank.
        rows_from: the number of rows received from each expert-parallel rank.
        received_ids: the ids [rows, 1] of the received tokens.
        num_selected: the sum of `min(k, V)` over the received tokens.
    """

    to_ranks: SortedCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    received_ids: TokenIds
    num_selected: int


@dataclass(frozen=True)
class DispatchPlan:
    """The plan of a micro-batch for all layers of a pipeline stage.

    Attributes:
        of_table: the plan of the layers that use a table of the routing mask, by the table's number.
    """

    of_table: Mapping[int, LayerPlan]


class DispatchPlanner:
    """Makes plans under a rank-local mask, where the destination of a token is a function of its id alone.

    Args:
        visible_experts: the routing mask, rank-local for the expert-parallel ranks.
        topk: k.
        tables: the tables that the stage's layers use.
        ep_group: the expert-parallel ranks. All ranks have micro-batches of one shape, and either all ranks have a
            padding mask or none has.
    """

    def __init__(
        self, visible_experts: VisibleExperts, topk: int, tables: Iterable[int], ep_group: ProcessGroup
    ) -> None:
        self._visible_experts = visible_experts
        self._topk = topk
        self._tables = tuple(sorted(set(tables)))
        self._group = ep_group

    def plan(self, token_ids: TokenIds) -> DispatchPlan:
        """Plan one micro-batch; a collective call. The host waits once, for the split sizes of all layers.

        Args:
            token_ids: the ids [batch, sequence] of this rank's tokens.
        """
        # Look up the destination of every token of every rank.
        rank, num_ranks = get_pg_rank(self._group), get_pg_size(self._group)
        ids, is_padding = self._gather_ids(token_ids)  # [ranks, tokens] each
        tables = torch.tensor(self._tables).to(ids.device, non_blocking=True)
        destination, num_visible = self._visible_experts.rank_and_size(ids, tables)  # [tables, ranks, tokens] each
        is_received = destination == rank

        # Count rows and selected experts, and bring the counts of all tables to the host at once.
        own_destination = destination[:, rank]  # [tables, tokens]
        is_sent = own_destination.unsqueeze(-1) == torch.arange(num_ranks, device=ids.device)
        rows_from = is_received.sum(dim=-1)  # [tables, ranks]
        num_selected = (num_visible.clamp(max=self._topk) * is_received).sum(dim=(1, 2))  # [tables]
        counts = torch.cat([is_sent.sum(dim=1), rows_from, num_selected.unsqueeze(1)], dim=1).tolist()

        # Order the tokens by destination, and list the received tokens of one table after the other.
        to_ranks = SortedCopies.permutations(own_destination.argsort(dim=1, stable=True))
        num_received = [sum(of_table[num_ranks:-1]) for of_table in counts]
        received = torch.nonzero_static(is_received.flatten(1), size=sum(num_received))[:, 1:]  # [rows, 1]
        received_ids = ids.flatten()[received].split(num_received)
        padding = [None] * len(counts) if is_padding is None else is_padding.flatten()[received].split(num_received)
        return DispatchPlan(
            {
                table: LayerPlan(
                    to_ranks=to_ranks[index],
                    rows_to=tuple(of_table[:num_ranks]),
                    rows_from=tuple(of_table[num_ranks:-1]),
                    received_ids=TokenIds(received_ids[index], padding[index]),
                    num_selected=of_table[-1],
                )
                for index, (table, of_table) in enumerate(zip(self._tables, counts, strict=True))
            }
        )

    def _gather_ids(self, token_ids: TokenIds) -> tuple[Tensor, Tensor | None]:
        """Gather ids, int64, and padding, bool, of all ranks: [ranks, tokens], tokens ordered as in the layers."""
        ids = token_ids.ids.int()
        if token_ids.is_padding is not None:
            # Padding is sent as the bitwise complement of the id, which is negative: one collective carries both.
            ids = torch.where(token_ids.is_padding, ~ids, ids)
        own = ids.t().reshape(1, -1)  # of [sequence, batch]
        gathered = own.new_empty(get_pg_size(self._group), own.shape[1])
        torch.distributed.all_gather_into_tensor(gathered, own, group=self._group)
        gathered = gathered.long()
        if token_ids.is_padding is None:
            return gathered, None
        is_padding = gathered < 0
        return torch.where(is_padding, ~gathered, gathered), is_padding
