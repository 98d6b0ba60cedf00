"""One-copy dispatch: an all-to-all that sends a token to each rank once, however many of the rank's experts it uses."""

from collections.abc import Callable
from functools import cached_property

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import RowBuffers, RowExchange, copies_of_map
from maskmoe.transformer.dispatch.to_experts import CopyToExperts, WayBack, local_experts
from maskmoe.transformer.kernels import launching
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

    1. Choose experts. Count the rows for each rank and expert, exchange the counts, and start their copy to the host.
    2. Copy the rows for each rank. The host waits for the counts.
    3. All-to-all of the rows, and of the weights of the receiving rank's experts.
    4. Copy the received rows to the local experts.
    5. [experts]
    6. Add the outputs of each received row, all-to-all back, and add the sums that the ranks returned for each token.

    Rows of latent experts are compressed between the first two steps, and the sums expanded after the last step.

    Outputs are added by expert within a rank, then by rank. With at most two experts for each token, the result is
    bit-equal to the stock dispatcher's; with more experts, the order of additions differs.

    Args:
        config: the model's configuration; every rank holds an equal, contiguous share of the experts.
        ep_group: the expert-parallel ranks.
        compress: maps hidden states [sequence, batch, hidden] to the width of the experts.
        expand: maps the width of the experts to the width of hidden states.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ep_group: ProcessGroup,
        compress: Callable[[Tensor], Tensor] = unchanged,
        expand: Callable[[Tensor], Tensor] = unchanged,
    ) -> None:
        self._group = ep_group
        self._compress, self._expand = compress, expand
        self._num_ranks = ep_group.size()
        self._topk = config.moe_router_topk
        experts = local_experts(config, ep_group)
        self._num_local_experts = experts.stop - experts.start
        self._buffers = RowBuffers()
        self._copy_to_experts = CopyToExperts(
            slice(0, self._num_local_experts), self._topk, self._buffers, config.moe_permute_fusion
        )
        self._stream = torch.cuda.Stream()

    def route_and_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and send one copy for each rank; see `Dispatcher`."""
        probs, routing_map = router(hidden_states, token_ids)
        selected = routing_map.unflatten(
            1, (self._num_ranks, self._num_local_experts)
        )  # [tokens, ranks, local experts]
        to_rank = selected.any(dim=-1)  # [tokens, ranks]
        counts = ExchangedCounts(selected, to_rank, self._group, self._stream)

        # Kernels can copy rows before the host knows the number of copies.
        max_copies = min(self._topk, self._num_ranks)
        num_copies = len(to_rank) * max_copies if launching.runs_kernels(to_rank) else sum(counts.rows_to)
        to_ranks = copies_of_map(to_rank, num_copies, max_copies)
        exchange = RowExchange(self._group, self._buffers, to_ranks, counts)
        compressed = self._compress(hidden_states)
        rows = exchange.dispatch(compressed.flatten(0, 1))

        # Send weights along with the rows; they also tell the receiving rank which of its experts are selected.
        weights = probs.masked_fill(~routing_map, _NOT_SELECTED).unflatten(1, (self._num_ranks, -1))
        weights = to_ranks.pick(weights, sum(counts.rows_to))
        # [rows, local experts]
        weights = all_to_all(self._group, weights, list(counts.rows_from), list(counts.rows_to))
        expert_rows = self._copy_to_experts(
            rows, weights, weights != _NOT_SELECTED, int(counts.tokens_per_expert.sum())
        )
        return Dispatched(
            expert_input=expert_rows.values,
            tokens_per_expert=counts.tokens_per_expert,
            weights=expert_rows.weights,
            metadata=WayBack(exchange, expert_rows.sum_outputs, compressed.shape),
        )

    def combine(self, expert_output: Tensor, metadata: WayBack) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        return self._expand(metadata.combine(expert_output))


class ExchangedCounts:
    """Exchanges the numbers of rows of one layer, and copies the numbers to the host in the background.

    The host waits when it first reads a number, for an event of a side stream.

    Args:
        selected: bool [tokens, ranks, local experts], the selected experts.
        to_rank: bool [tokens, ranks], the ranks that each token is sent to.
        group: the ranks.
        stream: copies to the host.
    """

    def __init__(self, selected: Tensor, to_rank: Tensor, group: ProcessGroup, stream: torch.cuda.Stream) -> None:
        counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), selected.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
        both = torch.stack([counts, counts])  # [sent and received, ranks, 1 + local experts]
        torch.distributed.all_to_all_single(both[1], counts, group=group)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._on_host = both.to("cpu", non_blocking=True)
            self._event = stream.record_event()
        both.record_stream(stream)

    @cached_property
    def _counts(self) -> Tensor:
        """Wait for the counts; int64 [sent and received, ranks, 1 + local experts], on the host."""
        self._event.synchronize()
        return self._on_host

    @cached_property
    def rows_to(self) -> tuple[int, ...]:
        """The number of rows sent to each rank."""
        return tuple(self._counts[0, :, 0].tolist())

    @cached_property
    def rows_from(self) -> tuple[int, ...]:
        """The number of rows received from each rank."""
        return tuple(self._counts[1, :, 0].tolist())

    @cached_property
    def tokens_per_expert(self) -> Tensor:
        """The tokens of each local expert, int64 [local experts], on the host."""
        return self._counts[1, :, 1:].sum(dim=0)
