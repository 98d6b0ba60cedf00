"""One-copy dispatch: an all-to-all that sends a token to each rank once, however many of the rank's experts it uses."""

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import RowBuffers, RowCopies, RowExchange
from maskmoe.transformer.token_ids import TokenIds

_NOT_SELECTED = -1.0
"""Replaces the weight of an expert that is not selected. Weights of selected experts are never negative."""


class OneCopyDispatcher:
    """Sends one row for each token and destination rank, and receives one sum of expert outputs for each.

    `MoEAlltoAllTokenDispatcher` sends one row for each selected expert. If several experts of a token are on one rank,
    this dispatcher sends the row once, the receiving rank copies the row to each expert, and adds the weighted outputs
    before they travel back. The same holds for the gradients. An all-to-all of hidden states therefore carries
    `ranks per token * hidden` elements instead of `experts per token * hidden`.

    1. Choose experts. Count the rows for each rank and expert, and exchange the counts. The host waits for the counts.
    2. All-to-all of the rows, and of the weights of the receiving rank's experts.
    3. Copy the received rows to the local experts.
    4. [experts]
    5. Add the outputs of each received row, all-to-all back, and add the sums that the ranks returned for each token.

    Outputs are added by expert within a rank, then by rank. With at most two experts for each token, the result is
    bit-equal to the stock dispatcher's; with more experts, the order of additions differs.

    Args:
        num_experts: N; every rank holds an equal, contiguous share of the experts.
        ep_group: the expert-parallel ranks.
    """

    def __init__(self, num_experts: int, ep_group: ProcessGroup) -> None:
        self._group = ep_group
        self._num_ranks = ep_group.size()
        self._num_local_experts = num_experts // self._num_ranks
        self._buffers = RowBuffers()

    def route_and_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and send one copy for each rank; see `Dispatcher`."""
        probs, routing_map = router(hidden_states, token_ids)
        selected = routing_map.unflatten(
            1, (self._num_ranks, self._num_local_experts)
        )  # [tokens, ranks, local experts]
        to_rank = selected.any(dim=-1)  # [tokens, ranks]
        rows_to, rows_from, tokens_per_expert = self._exchange_counts(selected, to_rank)
        to_ranks = RowCopies.from_map(to_rank, sum(rows_to), has_every_row=False)

        # Send weights along with the rows; they also tell the receiving rank which of its experts are selected.
        weights = probs.masked_fill(~routing_map, _NOT_SELECTED).view(-1, self._num_local_experts)
        weights = weights.index_select(0, to_ranks.rows * self._num_ranks + to_ranks.targets)
        weights = all_to_all(self._group, weights, list(rows_from), list(rows_to))  # [rows, local experts]
        num_copies = int(tokens_per_expert.sum())
        to_local_experts = RowCopies.from_map(weights != _NOT_SELECTED, num_copies, has_every_row=True)

        exchange = RowExchange(self._group, self._buffers, to_ranks, rows_to, rows_from, to_local_experts)
        return Dispatched(
            expert_input=exchange.dispatch(hidden_states.flatten(0, 1)),
            tokens_per_expert=tokens_per_expert,
            weights=weights_of_copies(weights, to_local_experts),
            metadata=(exchange, hidden_states.shape),
        )

    def combine(self, expert_output: Tensor, metadata: tuple[RowExchange, torch.Size]) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        exchange, shape = metadata
        return exchange.combine(expert_output).view(shape)

    def _exchange_counts(self, selected: Tensor, to_rank: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], Tensor]:
        """Exchange the numbers of rows; the host waits for them.

        Args:
            selected: bool [tokens, ranks, local experts], the selected experts.
            to_rank: bool [tokens, ranks], the ranks that each token is sent to.

        Returns:
            rows sent to each rank, rows received from each rank, and int64 [local experts] tokens of each local expert.
        """
        counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), selected.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
        received = torch.empty_like(counts)
        torch.distributed.all_to_all_single(received, counts, group=self._group)
        sent, received = torch.stack([counts, received]).cpu()
        return tuple(sent[:, 0].tolist()), tuple(received[:, 0].tolist()), received[:, 1:].sum(dim=0)


def weights_of_copies(weights: Tensor, copies: RowCopies) -> Tensor:
    """Pick the weight [copies] of each copy from the weights [rows, local experts] of the rows."""
    return weights.flatten().index_select(0, copies.rows * weights.shape[1] + copies.targets)
