"""Where tokens go in every layer, known from their ids before the first layer runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import one_hot

from maskmoe.transformer.row_copies import RowCopies
from maskmoe.transformer.visible_experts import VisibleExperts


@dataclass(frozen=True)
class LayerPlan:
    """How the tokens of a micro-batch go to the ranks of their experts in the layers of one table.

    Attributes:
        sent: this rank's tokens by rank, each once.
        rows_to, rows_from: rows sent to, and received from, each expert-parallel rank.
        received_ids: int64 [rows], the ids of the received tokens.
        num_selected: the sum of `min(k, V)` over the received tokens.
    """

    sent: RowCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    received_ids: Tensor
    num_selected: int


@dataclass(frozen=True)
class DispatchPlan:
    """The plan of a micro-batch for all layers of a pipeline stage, by the number of their table."""

    of_table: Mapping[int, LayerPlan]


class PlannedTokenIds(Tensor):
    """Token ids that carry the plan made from them to the layers, through Megatron-Core's recomputation, too.

    That saves the tensor, and hands a detached one to the layers that it runs again.
    """

    plan: DispatchPlan

    @classmethod
    def attach(cls, token_ids: Tensor, plan: DispatchPlan) -> "PlannedTokenIds":
        """The ids with the plan."""
        planned = token_ids.as_subclass(cls)
        planned.plan = plan
        return planned

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """What is made of these ids is a plain tensor, unless it is the same ids."""
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        if function is Tensor.detach:
            return cls.attach(result, args[0].plan)
        return result.as_subclass(Tensor) if type(result) is cls else result


def plan_of(token_ids: Tensor) -> DispatchPlan | None:
    """The plan that the ids carry, if any."""
    return token_ids.plan if isinstance(token_ids, PlannedTokenIds) else None


class DispatchPlanner:
    """Makes plans under a rank-local mask: the destination of a token is a function of its id alone.

    Args:
        visible_experts: the routing mask, rank-local for the expert-parallel ranks.
        topk: k.
        tables: those of the stage's layers.
        ep_group: the expert-parallel ranks; all have micro-batches of the same shape.
    """

    def __init__(self, visible_experts: VisibleExperts, topk: int, tables: Iterable[int], ep_group: ProcessGroup):
        self._visible_experts = visible_experts
        self._topk = topk
        self._tables = tuple(sorted(set(tables)))
        self._group = ep_group

    def plan(self, token_ids: Tensor) -> DispatchPlan:
        """The plan of one micro-batch; a collective call. The host waits once, for the split sizes of all layers.

        Args:
            token_ids: int64 [batch, sequence].
        """
        rank, num_ranks = get_pg_rank(self._group), get_pg_size(self._group)
        ids = self._gather_ids(token_ids)  # [ranks, tokens]
        tables = torch.tensor(self._tables, device=ids.device)
        destination, num_visible = self._visible_experts.ranks_of(ids, tables)  # [tables, ranks, tokens] each
        is_mine = destination == rank
        rows_to = one_hot(destination[:, rank], num_ranks).sum(dim=1)  # [tables, ranks]
        rows_from = is_mine.sum(dim=-1)  # [tables, ranks]
        num_selected = (num_visible.clamp(max=self._topk) * is_mine).sum(dim=(1, 2))  # [tables]
        sizes = torch.cat([rows_to, rows_from, num_selected.unsqueeze(1)], dim=1).tolist()
        order = destination[:, rank].argsort(dim=1, stable=True)  # [tables, tokens]
        return DispatchPlan(
            {
                table: LayerPlan(
                    sent=RowCopies.permutation(order[index]),
                    rows_to=tuple(sizes[index][:num_ranks]),
                    rows_from=tuple(sizes[index][num_ranks:-1]),
                    received_ids=_select(ids, is_mine[index], sum(sizes[index][num_ranks:-1])),
                    num_selected=sizes[index][-1],
                )
                for index, table in enumerate(self._tables)
            }
        )

    def _gather_ids(self, token_ids: Tensor) -> Tensor:
        """The ids of all ranks, int64 [ranks, tokens], in the order in which layers have their tokens."""
        own = token_ids.t().reshape(1, -1).int()  # of [sequence, batch]
        ids = own.new_empty(get_pg_size(self._group), own.shape[1])
        torch.distributed.all_gather_into_tensor(ids, own, group=self._group)
        return ids.long()


def _select(values: Tensor, selected: Tensor, num_selected: int) -> Tensor:
    """The selected values [num_selected], without waiting for the device to count them."""
    return values.flatten().index_select(0, torch.nonzero_static(selected.flatten(), size=num_selected).squeeze(1))
