"""One-copy dispatch: an all-to-all that sends a token to each rank once, however many of the rank's experts it uses.

On one rank, nothing is sent, and `OneRankDispatcher` copies the rows to the experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Size, Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.all_to_all import RowExchange, SentRows
from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import CopyRows, KnownExperts, LayerPlan, RowMap
from maskmoe.transformer.token_ids import TokenIds

_NOT_SELECTED = -1.0
"""Replaces the weight of an expert that is not selected. Weights of selected experts are never negative."""


@dataclass(frozen=True)
class _SentTokens:
    """Tokens that travel to the ranks of their experts.

    Attributes:
        plan: How the tokens travel.
        indices: Int64 [copies], the index of each sent copy in the flattened map [tokens, ranks].
        rows: The copies that are received.
        combine: Sends a sum of outputs back for each received copy, and adds the sums of each token. Holds no rows.
    """

    plan: LayerPlan
    indices: Tensor
    rows: SentRows
    combine: RowMap


def unchanged(rows: Tensor) -> Tensor:
    """Return the rows: experts that are not latent have the width of the hidden states."""
    return rows


class OneCopyDispatcher:
    """Sends one row for each token and destination rank, and receives one sum of expert outputs for each.

    `MoEAlltoAllTokenDispatcher` sends one row for each selected expert. If several experts of a token are on one rank,
    this dispatcher sends the row once, the receiving rank copies the row to each expert, and adds the weighted outputs
    before they travel back. The same holds for the gradients. An all-to-all of hidden states therefore carries
    `ranks per token * hidden` elements instead of `experts per token * hidden`.

    1. Choose experts. Count the rows for each rank and expert, and exchange the counts. The host waits for the counts.
    2. Start the all-to-all of the rows, and of the weights of the destination's experts.
    3. Wait for rows and weights. Before that, the layer computes its shared experts.
    4. Copy the received rows to the local experts.
    5. [experts]
    6. Add the outputs of each received row, all-to-all back, and add the sums that the ranks returned for each token.

    If dispatch is planned, `DispatchPlanner` has exchanged the counts before the first layer. Then the host waits for
    nothing, and the rows leave before experts are chosen. If each id of the layer's table sees one expert, the layer
    needs no router, and no weights travel.

    Rows of latent experts are compressed before step 2, and the sums expanded after the last step.

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
        is_planned: bool = False,
        compress: Callable[[Tensor], Tensor] = unchanged,
        expand: Callable[[Tensor], Tensor] = unchanged,
    ) -> None:
        self._group = ep_group
        self._is_planned = is_planned
        self._compress, self._expand = compress, expand
        self._copy_rows = CopyRows(config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Choose experts and start to send one copy for each rank; see `Dispatcher`.

        Raises:
            RuntimeError: Dispatch is planned, and the token ids have no plan.
        """
        if self._is_planned:
            sent = self._send(hidden_states, _plan_of_layer(token_ids, router))
            if sent.plan.experts is not None and router.fixed_weight is not None:
                router.count(sent.plan.experts.statistics)
                return partial(self._finish_known, sent, sent.plan.experts, router.fixed_weight)
            weights, _ = self._choose(hidden_states, token_ids, router)
        else:
            weights, selected = self._choose(hidden_states, token_ids, router)
            sent = self._send(hidden_states, exchange_counts(selected, self._group, self._copy_rows))
        weights_of_copies = weights.flatten(0, 1).index_select(0, sent.indices)
        return partial(self._finish, sent, sent.plan.exchange.send(weights_of_copies))

    def _choose(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> tuple[Tensor, Tensor]:
        """Return weights and the map of selected experts: [tokens, ranks, local experts]; other weights are a mark."""
        probs, routing_map = router(hidden_states, token_ids)
        weights = probs.masked_fill(~routing_map, _NOT_SELECTED)
        shape = (self._group.size(), -1)
        return weights.unflatten(1, shape), routing_map.unflatten(1, shape)

    def _send(self, hidden_states: Tensor, plan: LayerPlan) -> _SentTokens:
        """Start to send one copy of each token to each rank of its experts."""
        compressed = self._compress(hidden_states)
        copied = plan.to_ranks(compressed.flatten(0, 1))
        combine = partial(self._combine, plan.exchange, copied.sum_copies, compressed.shape)
        return _SentTokens(plan, copied.values, plan.exchange.send(copied.copies), combine)

    def _finish(self, sent: _SentTokens, sent_weights: SentRows) -> Dispatched:
        """Wait for rows and weights, and copy the rows to the local experts."""
        rows, weights = sent.rows.receive(), sent_weights.receive()
        selected = weights != _NOT_SELECTED  # [rows, local experts]
        expert_rows = self._copy_rows.to_experts(rows, weights, selected, sent.plan.num_selected)
        tokens_per_expert = sent.plan.tokens_per_expert
        return Dispatched(
            expert_input=expert_rows.copies,
            tokens_per_expert=selected.sum(dim=0) if tokens_per_expert is None else tokens_per_expert,
            weights=expert_rows.values,
            combine=_in_turn(expert_rows.sum_copies, sent.combine),
        )

    def _finish_known(self, sent: _SentTokens, experts: KnownExperts, weight: float) -> Dispatched:
        """Wait for the rows, and order them by expert, where every id sees one expert."""
        rows, sum_outputs = sent.rows.receive(), unchanged
        if experts.by_expert is not None:
            ordered = experts.by_expert.copy(rows)
            rows, sum_outputs = ordered.copies, ordered.sum_copies
        assert sent.plan.tokens_per_expert is not None
        weights = torch.full((len(rows),), weight, device=rows.device)
        return Dispatched(rows, sent.plan.tokens_per_expert, weights, _in_turn(sum_outputs, sent.combine))

    def _combine(self, exchange: RowExchange, sum_copies: RowMap, shape: Size, sums: Tensor) -> Tensor:
        """Send the sums [received rows, features] back, and add them up for each token: [sequence, batch, hidden]."""
        return self._expand(sum_copies(exchange.send_back(sums)).view(shape))


def _in_turn(first: RowMap, second: RowMap) -> RowMap:
    """Return the map that applies two maps in turn."""
    return lambda rows: second(first(rows))


def _plan_of_layer(token_ids: TokenIds, router: Router) -> LayerPlan:
    """Return the plan for a router's layer."""
    if token_ids.plan is None:
        raise RuntimeError(
            "planned dispatch got token ids without a plan. The model must plan each micro-batch, and whatever passes "
            "`padding_mask` on to the layers must not replace the tensor"
        )
    return token_ids.plan[router.table]


def exchange_counts(selected: Tensor, group: ProcessGroup, copy_rows: CopyRows) -> LayerPlan:
    """Exchange the numbers of rows of one layer; the host waits for the result.

    `selected` is bool [tokens, ranks, local experts]; `copy_rows` makes the copies.
    """
    to_rank = selected.any(dim=-1)  # [tokens, ranks]
    counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), selected.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
    both = torch.stack([counts, counts])
    torch.distributed.all_to_all_single(both[1], counts, group=group)
    sent, received = both.cpu()
    rows_to, rows_from = tuple(sent[:, 0].tolist()), tuple(received[:, 0].tolist())
    tokens_per_expert = received[:, 1:].sum(dim=0)
    return LayerPlan(
        to_ranks=partial(copy_rows.to_ranks, chosen=to_rank, num_copies=sum(rows_to)),
        exchange=RowExchange(group, rows_to, rows_from),
        num_selected=int(tokens_per_expert.sum()),
        tokens_per_expert=tokens_per_expert,
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
        self._copy_rows = CopyRows(config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Do nothing yet, because nothing travels; see `Dispatcher`."""
        return partial(self._dispatch, hidden_states, token_ids, router)

    def _dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and copy one row to each."""
        probs, routing_map = router(hidden_states, token_ids)
        tokens_per_expert = routing_map.sum(dim=0).cpu()
        compressed = self._compress(hidden_states)
        num_copies = int(tokens_per_expert.sum())
        rows = self._copy_rows.to_experts(compressed.flatten(0, 1), probs, routing_map, num_copies)
        combine = _in_turn(rows.sum_copies, partial(self._finish, compressed.shape))
        return Dispatched(rows.copies, tokens_per_expert, rows.values, combine)

    def _finish(self, shape: Size, sums: Tensor) -> Tensor:
        """Bring sums [tokens, features] to the shape of the hidden states."""
        return self._expand(sums.view(shape))
