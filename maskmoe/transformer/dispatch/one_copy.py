"""One-copy dispatch: an all-to-all that sends a token to each rank once, however many of the rank's experts it uses.

On one rank, nothing is sent, and `OneRankDispatcher` copies the rows to the experts.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Size, Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.all_to_all import RowExchange, SentRows
from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import (
    CopyToExperts,
    DispatchRecord,
    KnownExperts,
    LayerPlan,
    RowCopies,
)
from maskmoe.transformer.token_ids import TokenIds

_NOT_SELECTED = -1.0
"""Replaces the weight of an expert that is not selected. Weights of selected experts are never negative."""


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
        self._copy_to_experts = CopyToExperts(config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Choose experts and start to send one copy for each rank; see `Dispatcher`.

        Raises:
            RuntimeError: Dispatch is planned, and the token ids have no plan.
        """
        if self._is_planned:
            plan = _plan_of_layer(token_ids, router)
            sent, shape = self._send(hidden_states, plan)
            if plan.experts is not None and router.fixed_weight is not None:
                router.count(plan.experts.statistics)
                return partial(_finish_known, plan, plan.experts, sent, shape, router.fixed_weight)
            weights, _ = self._choose(hidden_states, token_ids, router)
        else:
            weights, selected = self._choose(hidden_states, token_ids, router)
            plan = exchange_counts(selected, self._group)
            sent, shape = self._send(hidden_states, plan)
        sent_weights = plan.exchange.send(plan.to_ranks.pick(weights))
        return partial(self._finish, plan, sent, sent_weights, shape)

    def combine(self, expert_output: Tensor, metadata: DispatchRecord) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        return self._expand(metadata.combine(expert_output))

    def _choose(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> tuple[Tensor, Tensor]:
        """Return weights and the map of selected experts: [tokens, ranks, local experts]; other weights are a mark."""
        probs, routing_map = router(hidden_states, token_ids)
        weights = probs.masked_fill(~routing_map, _NOT_SELECTED)
        shape = (self._group.size(), -1)
        return weights.unflatten(1, shape), routing_map.unflatten(1, shape)

    def _send(self, hidden_states: Tensor, plan: LayerPlan) -> tuple[SentRows, Size]:
        """Start to send one copy of each token to each rank of its experts; return the tokens' shape as well."""
        compressed = self._compress(hidden_states)
        rows = plan.to_ranks.copy_rows_with_gradient(compressed.flatten(0, 1))
        return plan.exchange.send(rows), compressed.shape

    def _finish(self, plan: LayerPlan, sent: SentRows, sent_weights: SentRows, shape: Size) -> Dispatched:
        """Wait for rows and weights, and copy the rows to the local experts."""
        rows, weights = sent.receive(), sent_weights.receive()
        selected = weights != _NOT_SELECTED  # [rows, local experts]
        expert_rows = self._copy_to_experts(rows, weights, selected, plan.num_selected)
        tokens_per_expert = plan.tokens_per_expert
        return Dispatched(
            expert_input=expert_rows.values,
            tokens_per_expert=selected.sum(dim=0) if tokens_per_expert is None else tokens_per_expert,
            weights=expert_rows.weights,
            metadata=DispatchRecord(expert_rows.sum_outputs, shape, plan),
        )


def _finish_known(plan: LayerPlan, experts: KnownExperts, sent: SentRows, shape: Size, weight: float) -> Dispatched:
    """Wait for the rows, and order them by expert, where every id sees one expert."""
    rows, sum_outputs = sent.receive(), unchanged
    if experts.by_expert is not None:
        rows = experts.by_expert.copy_rows_with_gradient(rows)
        sum_outputs = experts.by_expert.sum_copies_with_gradient
    assert plan.tokens_per_expert is not None
    weights = torch.full((len(rows),), weight, device=rows.device)
    return Dispatched(rows, plan.tokens_per_expert, weights, DispatchRecord(sum_outputs, shape, plan))


def _plan_of_layer(token_ids: TokenIds, router: Router) -> LayerPlan:
    """Return the plan for a router's layer."""
    if token_ids.plan is None:
        raise RuntimeError(
            "planned dispatch got token ids without a plan. The model must plan each micro-batch, and whatever passes "
            "`padding_mask` on to the layers must not replace the tensor"
        )
    return token_ids.plan[router.table]


def exchange_counts(selected: Tensor, group: ProcessGroup) -> LayerPlan:
    """Exchange the numbers of rows of one layer; the host waits for the result.

    `selected` is bool [tokens, ranks, local experts].
    """
    to_rank = selected.any(dim=-1)  # [tokens, ranks]
    counts = torch.cat([to_rank.sum(dim=0).unsqueeze(1), selected.sum(dim=0)], dim=1)  # [ranks, 1 + local experts]
    both = torch.stack([counts, counts])
    torch.distributed.all_to_all_single(both[1], counts, group=group)
    sent, received = both.cpu()
    rows_to, rows_from = tuple(sent[:, 0].tolist()), tuple(received[:, 0].tolist())
    tokens_per_expert = received[:, 1:].sum(dim=0)
    return LayerPlan(
        to_ranks=RowCopies.from_map(to_rank, sum(rows_to)),
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
        self._copy_to_experts = CopyToExperts(config.moe_permute_fusion)

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
