"""Plans of dispatch: where the tokens of a micro-batch go in every layer, computed before the first layer runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import one_hot

from maskmoe.transformer.dispatch.rows import RowCopies
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

    to_ranks: RowCopies
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
        tables = torch.tensor(self._tables, device=ids.device)
        destination, num_visible = self._visible_experts.rank_and_size(ids, tables)  # [tables, ranks, tokens] each
        is_received = destination == rank

        # Count rows and selected experts, and bring the counts of all tables to the host at once.
        rows_to = one_hot(destination[:, rank], num_ranks).sum(dim=1)  # [tables, ranks]
        rows_from = is_received.sum(dim=-1)  # [tables, ranks]
        num_selected = (num_visible.clamp(max=self._topk) * is_received).sum(dim=(1, 2))  # [tables]
        counts = torch.cat([rows_to, rows_from, num_selected.unsqueeze(1)], dim=1).tolist()

        order = destination[:, rank].argsort(dim=1, stable=True)  # [tables, tokens]
        plans = {}
        for index, (table, of_table) in enumerate(zip(self._tables, counts, strict=True)):
            rows_from_ranks = tuple(of_table[num_ranks:-1])
            received = torch.nonzero_static(is_received[index].flatten(), size=sum(rows_from_ranks))  # [rows, 1]
            plans[table] = LayerPlan(
                to_ranks=RowCopies.permutation(order[index]),
                rows_to=tuple(of_table[:num_ranks]),
                rows_from=rows_from_ranks,
                received_ids=TokenIds(
                    ids.flatten()[received], None if is_padding is None else is_padding.flatten()[received]
                ),
                num_selected=of_table[-1],
            )
        return DispatchPlan(plans)

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
