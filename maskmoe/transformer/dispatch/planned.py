"""Planned dispatch: token ids tell every destination before the first layer runs, so layers exchange only rows."""

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import RowBuffers, RowExchange
from maskmoe.transformer.dispatch.to_experts import CopyToExperts, SavedByExperts, WayBack, local_experts
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
        config: the model's configuration; every rank holds an equal, contiguous share of the experts.
        ep_group: the expert-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, ep_group: ProcessGroup) -> None:
        self._group = ep_group
        self._buffers = RowBuffers()
        self._experts = local_experts(config, ep_group)
        self._copy_to_experts = CopyToExperts(
            self._experts, config.moe_router_topk, self._buffers, config.moe_permute_fusion
        )

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
        exchange = RowExchange(self._group, self._buffers, plan.to_ranks, plan)
        rows = exchange.dispatch(router.attach_losses(hidden_states, token_ids))

        # The router takes [sequence, batch, hidden], so the rows form one sequence.
        saved = SavedByExperts(rows)
        with saved.while_routing():
            probs, routing_map = router(rows.unsqueeze(1), plan.received_ids, False)
        expert_rows = self._copy_to_experts(rows, probs, routing_map, plan.num_selected)
        saved.keep(expert_rows)
        return Dispatched(
            expert_input=expert_rows.values,
            tokens_per_expert=routing_map[:, self._experts].sum(dim=0),
            weights=expert_rows.weights,
            metadata=WayBack(exchange, expert_rows.sum_outputs, hidden_states.shape),
        )

    def combine(self, expert_output: Tensor, metadata: WayBack) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        return metadata.combine(expert_output)
