"""All-to-all dispatch that sends a token to each rank once, however many of that rank's experts it uses."""

from dataclasses import dataclass, replace

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch_plan import LayerPlan
from maskmoe.transformer.row_copies import RowCopies
from maskmoe.transformer.row_exchange import RowExchange

_NOT_SELECTED = -1.0
"""Stands in the place of a weight, which is never negative, where an expert is not selected."""


@dataclass(frozen=True)
class Dispatch:
    """How the tokens of one layer went to their experts, by which they find back.

    Attributes:
        exchange: between the ranks, and on to the local experts.
        tokens_per_expert: int64 [local experts], in host memory.
    """

    exchange: RowExchange
    tokens_per_expert: Tensor


class OneCopyDispatcher:
    """Sends hidden states to the ranks of their experts and sums of the experts' outputs back, one row a rank.

    `MoEAlltoAllTokenDispatcher` sends one row per selected expert. Here, where several experts of a token are on one
    rank, its row crosses once, is copied for each of them there, and their weighted outputs are added before they
    travel back; the same holds for the gradients. What an all-to-all of hidden states carries is
    `ranks per token * hidden` instead of `experts per token * hidden`.

    1. Count the rows for each rank and expert, and exchange the counts. The host waits for them.
    2. All-to-all of the rows, and of the weights of the receiving rank's experts.
    3. Copy the received rows to the local experts.
    4. [experts]
    5. Add the outputs of each received row, all-to-all back, and add what the ranks returned for each token.

    With a plan, which a rank-local mask allows, the first step is done for all layers at once, and experts are chosen
    where the rows arrive (`send`, the router, `dispatch_received`): all-to-alls carry hidden states and nothing else.

    Sums are over experts by rank, then over ranks: with at most two experts a token, bit-equal to the stock
    dispatcher's; with more they differ in the order of additions.

    Args:
        num_experts: N, of which every rank has an equal, contiguous share.
        ep_group: the expert-parallel ranks.
    """

    def __init__(self, num_experts: int, ep_group: ProcessGroup):
        self._group = ep_group
        self._num_ranks = ep_group.size()
        self._num_local_experts = num_experts // self._num_ranks

    def dispatch(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor, Dispatch]:
        """Send tokens to their experts.

        Args:
            hidden_states: [tokens, hidden].
            probs: [tokens, experts], the weights of the selected experts.
            routing_map: bool [tokens, experts], the selected experts.

        Returns:
            the input of this rank's experts [rows, hidden], ordered by expert; their weights [rows]; and the dispatch,
            for `combine`.
        """
        num_tokens = len(hidden_states)
        of_rank = routing_map.view(num_tokens, self._num_ranks, self._num_local_experts)
        to_rank = of_rank.any(dim=-1)  # [tokens, ranks]
        rows_to, rows_from, tokens_per_expert = self._exchange_counts(of_rank, to_rank)
        sent = RowCopies.from_map(to_rank, sum(rows_to), has_every_row=False)

        weights = probs.masked_fill(~routing_map, _NOT_SELECTED).view(-1, self._num_local_experts)
        weights = weights.index_select(0, sent.rows * self._num_ranks + sent.targets)
        weights = all_to_all(self._group, weights, list(rows_from), list(rows_to))  # [rows, local experts]
        fanned = RowCopies.from_map(weights != _NOT_SELECTED, int(tokens_per_expert.sum()), has_every_row=True)
        exchange = RowExchange(self._group, sent, rows_to, rows_from, fanned)
        return (
            exchange.there(hidden_states),
            self._weights_of_copies(weights, fanned),
            Dispatch(exchange, tokens_per_expert),
        )

    def send(self, hidden_states: Tensor, plan: LayerPlan) -> Tensor:
        """Send tokens [tokens, hidden] to where a plan says; returns what this rank receives, [rows, hidden]."""
        return self._exchange_of(plan).there(hidden_states)

    def dispatch_received(
        self, rows: Tensor, probs: Tensor, routing_map: Tensor, plan: LayerPlan
    ) -> tuple[Tensor, Tensor, Dispatch]:
        """Bring received rows to their experts.

        Args:
            rows: [rows, hidden].
            probs, routing_map: [rows, experts], see `dispatch`; all selected experts are this rank's.
            plan: by which the rows were sent.

        Returns:
            as `dispatch`.
        """
        first = self._group.rank() * self._num_local_experts
        local = slice(first, first + self._num_local_experts)
        selected = routing_map[:, local]
        fanned = RowCopies.from_map(selected, plan.num_selected, has_every_row=True)
        dispatch = Dispatch(replace(self._exchange_of(plan), fanned=fanned), selected.sum(dim=0).cpu())
        return fanned.take(rows), self._weights_of_copies(probs[:, local], fanned), dispatch

    def combine(self, expert_output: Tensor, dispatch: Dispatch) -> Tensor:
        """Bring the experts' weighted outputs back.

        Args:
            expert_output: [rows, hidden], in the order of the experts' input.
            dispatch: what brought them here.

        Returns:
            [tokens, hidden], the sum over each token's experts.
        """
        return dispatch.exchange.back(expert_output)

    def _exchange_of(self, plan: LayerPlan) -> RowExchange:
        return RowExchange(self._group, plan.sent, plan.rows_to, plan.rows_from)

    def _weights_of_copies(self, weights: Tensor, fanned: RowCopies) -> Tensor:
        """Of received rows [rows, local experts] to those of their copies [copies]."""
        return weights.flatten().index_select(0, fanned.rows * self._num_local_experts + fanned.targets)

    def _exchange_counts(self, of_rank: Tensor, to_rank: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Rows to each rank, rows from each rank, and int64 [local experts] tokens of each of this rank's experts."""
        counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), of_rank.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
        received = torch.empty_like(counts)
        torch.distributed.all_to_all_single(received, counts, group=self._group)
        sent, received = torch.stack([counts, received]).cpu()
        return tuple(sent[:, 0].tolist()), tuple(received[:, 0].tolist()), received[:, 1:].sum(dim=0)
