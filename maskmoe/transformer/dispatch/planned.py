"""Planned dispatch: token ids tell every destination before the first layer runs, so layers exchange only rows."""

from collections.abc import Callable, Iterable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.rows import CopyToExperts, DispatchRecord, RowCopies, RowExchange
from maskmoe.transformer.token_ids import DispatchPlan, LayerPlan, TokenIds
from maskmoe.transformer.visible_experts import VisibleExperts


class DispatchPlanner:
    """Makes plans under a rank-local mask, where the destination of a token is a function of its id alone.

    `tables` are those that the stage's layers use. All expert-parallel ranks have micro-batches of one shape, and
    either all of them have a padding mask or none has.
    """

    def __init__(
        self, visible_experts: VisibleExperts, topk: int, tables: Iterable[int], ep_group: ProcessGroup
    ) -> None:
        self._visible_experts = visible_experts
        self._topk = topk
        self._tables = tuple(sorted(set(tables)))
        self._group = ep_group

    def plan(self, token_ids: TokenIds) -> DispatchPlan:
        """Plan a micro-batch of ids [batch, sequence]; a collective call. The host waits once, for all split sizes."""
        # Look up the destination of every token of every rank.
        rank, num_ranks = get_pg_rank(self._group), get_pg_size(self._group)
        ids, is_padding = self._gather_ids(token_ids)  # [ranks, tokens] each
        tables = torch.tensor(self._tables).to(ids.device, non_blocking=True)
        destination, num_visible = self._visible_experts.rank_and_size(ids, tables)  # [tables, ranks, tokens] each
        is_received = destination == rank

        # Count rows and selected experts, and bring the counts of all tables to the host at once.
        own_destination = destination[:, rank]  # [tables, tokens]
        is_sent = own_destination.unsqueeze(-1) == torch.arange(num_ranks, device=ids.device)
        rows_from = is_received.sum(dim=-1)  # [tables, ranks]
        num_selected = (num_visible.clamp(max=self._topk) * is_received).sum(dim=(1, 2))  # [tables]
        counts = torch.cat([is_sent.sum(dim=1), rows_from, num_selected.unsqueeze(1)], dim=1).tolist()

        # Order the tokens by destination, and list the received tokens of one table after the other.
        to_ranks = RowCopies.permutations(own_destination.argsort(dim=1, stable=True))
        num_received = [sum(of_table[num_ranks:-1]) for of_table in counts]
        received = torch.nonzero_static(is_received.flatten(1), size=sum(num_received))[:, 1:]  # [rows, 1]
        received_ids = ids.flatten()[received].split(num_received)
        padding = [None] * len(counts) if is_padding is None else is_padding.flatten()[received].split(num_received)
        return {
            table: LayerPlan(
                to_ranks=to_ranks[index],
                rows_to=tuple(of_table[:num_ranks]),
                rows_from=tuple(of_table[num_ranks:-1]),
                received_ids=received_ids[index],
                received_padding=padding[index],
                num_selected=of_table[-1],
            )
            for index, (table, of_table) in enumerate(zip(self._tables, counts, strict=True))
        }

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


class PlannedDispatcher:
    """One-copy dispatch under a rank-local mask, by the plan that `DispatchPlanner` made from the token ids.

    All counts are known from the plan, and experts are chosen by the rank that holds all visible experts of a token:
    all-to-alls carry hidden states and nothing else, and no layer waits for counts.

    1. Start the all-to-all of the rows.
    2. Compute the router's losses over this rank's tokens, since other ranks route them. [shared experts]
    3. Wait for the rows, choose their experts, and copy the rows to the local experts.
    4. [experts]
    5. Add the outputs of each received row, and all-to-all back.

    The backward pass mirrors steps 1 to 3: the all-to-all of the gradients runs beside the backward pass of the losses
    and the shared experts.
    """

    def __init__(self, config: TransformerConfig, ep_group: ProcessGroup) -> None:
        assert config.num_moe_experts is not None
        self._group = ep_group
        num_local_experts = config.num_moe_experts // ep_group.size()
        first = ep_group.rank() * num_local_experts
        self._experts = slice(first, first + num_local_experts)
        self._copy_to_experts = CopyToExperts(self._experts, config.moe_permute_fusion)

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Start to send one copy to the rank that the plan names; experts are chosen there; see `Dispatcher`.

        Raises:
            RuntimeError: The token ids have no plan.
        """
        if token_ids.plan is None:
            raise RuntimeError(
                "planned dispatch got token ids without a plan. The model must plan each micro-batch, and whatever "
                "passes `padding_mask` on to the layers must not replace the tensor"
            )
        plan = token_ids.plan[router.table]
        exchange = RowExchange(self._group, plan.to_ranks, plan.rows_to, plan.rows_from)
        sent = exchange.dispatch(hidden_states.flatten(0, 1))
        rows_with_losses = router.attach_losses(sent.rows, hidden_states, token_ids)

        def finish() -> Dispatched:
            rows = sent.receive(rows_with_losses)
            # The router takes [sequence, batch, hidden], so the rows form one sequence.
            received = TokenIds(plan.received_ids, plan.received_padding)
            probs, routing_map = router(rows.unsqueeze(1), received, False)
            expert_rows = self._copy_to_experts(rows, probs, routing_map, plan.num_selected)
            return Dispatched(
                expert_input=expert_rows.values,
                tokens_per_expert=routing_map[:, self._experts].sum(dim=0),
                weights=expert_rows.weights,
                metadata=DispatchRecord(expert_rows.sum_outputs, hidden_states.shape, exchange),
            )

        return finish

    def combine(self, expert_output: Tensor, metadata: DispatchRecord) -> Tensor:
        """Send outputs back and add them up; see `Dispatcher`."""
        return metadata.combine(expert_output)
