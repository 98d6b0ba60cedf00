"""One-copy dispatch: an all-to-all that sends a token to each rank once, however many of the rank's experts it uses.

On one rank, nothing is sent, and `OneRankDispatcher` copies the rows to the experts.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import CopyToExperts, DispatchRecord, RowCopies, RowExchange
from maskmoe.transformer.token_ids import TokenIds

_NOT_SELECTED = -1.0
"""Replaces the weight of an expert that is not selected. Weights of selected experts are never negative."""


def unchanged(hidden_states: Tensor) -> Tensor:
    """Return the hidden states, whose width is also the width of experts that are not latent."""
    return hidden_states


class OneCopyDispatcher:
    """Sends one row for each token and destination rank, and receives one sum of expert outputs for each.

    `MoEAlltoAllTokenDispatcher` sends one row for each selected expert. If several experts of a token are on one rank,
    this dispatcher sends the row once, the receiving rank copies the row to each expert, and adds the weighted outputs
    before they travel back. The same holds for the gradients. An all-to-all of hidden states therefore carries
    `ranks per token * hidden` elements instead of `experts per token * hidden`.

    1. Choose experts. Count the rows for each rank and expert, and exchange the counts. The host waits for the counts.
    2. Copy the rows for each rank.
    3. All-to-all of the rows, while the layer computes its shared experts. All-to-all of the weights of the receiving
       rank's experts.
    4. Copy the received rows to the local experts.
    5. [experts]
    6. Add the outputs of each received row, all-to-all back, and add the sums that the ranks returned for each token.

    Rows of latent experts are compressed between the first two steps, and the sums expanded after the last step.

    Outputs are added by expert within a rank, then by rank. With at most two experts for each token, the result is
    bit-equal to the stock dispatcher's; with more experts, the order of additions differs. Beside shared experts, the
    order in which gradients of the hidden states are added differs, too.

    Every rank holds an equal, contiguous share of the experts. `compress` maps hidden states [sequence, batch, hidden]
    to the width of the experts, and `expand` maps outputs back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ep_group: ProcessGroup,
        compress: Callable[[Tensor], Tensor] = unchanged,
        expand: Callable[[Tensor], Tensor] = unchanged,
    ) -> None:
        assert config.num_moe_experts is not None
        self._group = ep_group
        self._compress, self._expand = compress, expand
        self._num_ranks = ep_group.size()
        num_local_experts = config.num_moe_experts // self._num_ranks
        self._copy_to_experts = CopyToExperts(slice(0, num_local_experts), config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Choose experts and start to send one copy for each rank; see `Dispatcher`."""
        probs, routing_map = router(hidden_states, token_ids)
        selected = routing_map.unflatten(1, (self._num_ranks, -1))  # [tokens, ranks, local experts]
        to_rank = selected.any(dim=-1)  # [tokens, ranks]
        counts = exchange_counts(selected, to_rank, self._group)

        to_ranks = RowCopies.from_map(to_rank, sum(counts.rows_to))
        exchange = RowExchange(self._group, to_ranks, counts.rows_to, counts.rows_from)
        compressed = self._compress(hidden_states)
        sent = exchange.dispatch(compressed.flatten(0, 1))

        def finish() -> Dispatched:
            rows = sent.receive(sent.rows)
            # Send weights after the rows; they also tell the receiving rank which of its experts are selected.
            weights = probs.masked_fill(~routing_map, _NOT_SELECTED).unflatten(1, (self._num_ranks, -1))
            weights = to_ranks.pick(weights)
            # [rows, local experts]
            weights = all_to_all(self._group, weights, list(counts.rows_from), list(counts.rows_to))
            expert_rows = self._copy_to_experts(
                rows, weights, weights != _NOT_SELECTED, int(counts.tokens_per_expert.sum())
            )
            return Dispatched(
                expert_input=expert_rows.values,
                tokens_per_expert=counts.tokens_per_expert,
                weights=expert_rows.weights,
                metadata=DispatchRecord(expert_rows.sum_outputs, compressed.shape, exchange),
            )

        return finish

    def combine(self, expert_output: Tensor, metadata: DispatchRecord) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        return self._expand(metadata.combine(expert_output))


class ExchangedCounts(NamedTuple):
    """The numbers of rows of one layer, on the host: to each rank, from each rank, and of each local expert (int64)."""

    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    tokens_per_expert: Tensor


def exchange_counts(selected: Tensor, to_rank: Tensor, group: ProcessGroup) -> ExchangedCounts:
    """Exchange the numbers of rows of one layer; the host waits for the result.

    `selected` is bool [tokens, ranks, local experts], and `to_rank` bool [tokens, ranks].
    """
    counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), selected.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
    both = torch.stack([counts, counts])
    torch.distributed.all_to_all_single(both[1], counts, group=group)
    sent, received = both.cpu()
    return ExchangedCounts(
        rows_to=tuple(sent[:, 0].tolist()),
        rows_from=tuple(received[:, 0].tolist()),
        tokens_per_expert=received[:, 1:].sum(dim=0),
    )


class OneRankDispatcher:
    """Copies each token to its experts, and adds up the experts' outputs of each token.

    On a CPU, results and gradients are bit-equal to those of `MoEAlltoAllTokenDispatcher` with one rank. That class
    sorts all pairs of a token and an expert, and copies the rows twice in each direction. This class finds the chosen
    pairs without a sort, and copies the rows once. The host waits once, for the counts. The arguments are those of
    `OneCopyDispatcher`.
    """

    def __init__(
        self, config: TransformerConfig, compress: Callable[[Tensor], Tensor], expand: Callable[[Tensor], Tensor]
    ) -> None:
        self._compress, self._expand = compress, expand
        self._copy_to_experts = CopyToExperts(slice(0, config.num_moe_experts), config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Do nothing yet, because nothing travels; see `Dispatcher`."""
        return partial(self._dispatch, hidden_states, token_ids, router)

    def _dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and copy one row to each."""
        probs, routing_map = router(hidden_states, token_ids)
        tokens_per_expert = routing_map.sum(dim=0).cpu()
        compressed = self._compress(hidden_states)
        rows = self._copy_to_experts(compressed.flatten(0, 1), probs, routing_map, int(tokens_per_expert.sum()))
        return Dispatched(
            expert_input=rows.values,
            tokens_per_expert=tokens_per_expert,
            weights=rows.weights,
            metadata=DispatchRecord(rows.sum_outputs, compressed.shape),
        )

    def combine(self, expert_output: Tensor, metadata: DispatchRecord) -> Tensor:
        """Add up the outputs of each token; see `Dispatcher`."""
        return self._expand(metadata.combine(expert_output))
