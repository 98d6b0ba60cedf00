"""Planned dispatch: token ids tell every destination before the first layer runs, so layers exchange only rows."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.one_copy import weights_of_copies
from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import RowBuffers, RowCopies, RowExchange
from maskmoe.transformer.token_ids import TokenIds


class PlannedDispatcher:
    """One-copy dispatch under a rank-local mask, by the plan that `DispatchPlanner` made from the token ids.

    All counts are known from the plan, and experts are chosen by the rank that holds all visible experts of a token:
    all-to-alls carry hidden states and nothing else, and no layer waits for counts.

    1. Attach the router's losses to this rank's tokens, since other ranks route them.
    2. All-to-all of the rows.
    3. Choose experts for the received rows, and copy the rows to the local experts.
    4. [experts]
    5. Add the outputs of each received row, and all-to-all back.

    Args:
        num_experts: N; every rank holds an equal, contiguous share of the experts.
        ep_group: the expert-parallel ranks.
    """

    def __init__(self, num_experts: int, ep_group: ProcessGroup) -> None:
        self._group = ep_group
        num_local_experts = num_experts // ep_group.size()
        first = ep_group.rank() * num_local_experts
        self._local_experts = slice(first, first + num_local_experts)
        self._buffers = RowBuffers()

    def route_and_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Send one copy to the rank that the plan names, and choose experts there; see `Dispatcher`.

        Raises:
            RuntimeError: the token ids have no plan.
        """
        if token_ids.plan is None:
            raise RuntimeError(
                "planned dispatch got token ids without a plan. The model must plan each micro-batch, and whatever "
                "passes `padding_mask` on to the layers must not replace the tensor"
            )
        plan = token_ids.plan.of_table[router.table]
        exchange = RowExchange(self._group, self._buffers, plan.to_ranks, plan.rows_to, plan.rows_from)
        rows = exchange.dispatch(router.attach_losses(hidden_states, token_ids))

        # The router takes [sequence, batch, hidden], so the rows form one sequence.
        probs, routing_map = router(rows.unsqueeze(1), plan.received_ids, False)
        selected = routing_map[:, self._local_experts]
        to_local_experts = RowCopies.from_map(selected, plan.num_selected, has_every_row=True)
        return Dispatched(
            expert_input=to_local_experts.copy_rows_with_gradient(rows),
            tokens_per_expert=selected.sum(dim=0),
            weights=weights_of_copies(probs[:, self._local_experts], to_local_experts),
            metadata=(replace(exchange, to_local_experts=to_local_experts), hidden_states.shape),
        )

    def combine(self, expert_output: Tensor, metadata: tuple[RowExchange, torch.Size]) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        exchange, shape = metadata
        return exchange.combine(expert_output).view(shape)
