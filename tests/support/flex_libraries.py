"""Stand-ins on the CPU for the operations of DeepEP, HybridEP and NCCL-EP that Megatron's flex dispatcher calls.

The stand-ins replace the functions of `megatron.core.transformer.moe.fused_a2a`, as Megatron-Core 0.19.2 calls them.
They send rows over the process group's own all-to-all, and refuse slots of experts that the libraries would refuse.
Megatron's managers around the functions run unchanged.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Plan:
    """The exchange of rows between ranks, for a destination map of ranks or of experts.

    Attributes:
        group: The ranks.
        token: int64 [sent rows], ordered by destination.
        destination: int64 [sent rows].
        sent: Rows for each rank.
        received: Rows of each rank.
        order: int64 [received rows]: the received rows ordered by local destination, then by rank and token.
        counts: int64 [local destinations], the received rows of each.
        num_tokens: Tokens of this rank.
    """

    group: ProcessGroup
    token: Tensor
    destination: Tensor
    sent: list[int]
    received: list[int]
    order: Tensor
    counts: Tensor
    num_tokens: int

    @classmethod
    def of(cls, group: ProcessGroup, destinations: Tensor) -> "Plan":
        """Exchange the numbers of rows; `destinations` is bool [tokens, ranks * local destinations]."""
        destination, token = destinations.T.nonzero().unbind(1)
        sent = destinations.sum(dim=0).view(group.size(), -1)
        received = torch.empty_like(sent)
        torch.distributed.all_to_all_single(received, sent, group=group)
        local = torch.arange(sent.shape[1]).repeat(group.size()).repeat_interleave(received.flatten())
        return cls(
            group,
            token,
            destination,
            sent.sum(dim=1).tolist(),
            received.sum(dim=1).tolist(),
            local.argsort(stable=True),
            received.sum(dim=0),
            len(destinations),
        )

    def send(self, rows: Tensor) -> Tensor:
        """Send rows [sent rows, …]; return [received rows, …]."""
        return all_to_all(self.group, rows, self.received, self.sent)[self.order]

    def send_back(self, rows: Tensor) -> Tensor:
        """Invert `send`."""
        return all_to_all(self.group, rows[self.order.argsort()], self.sent, self.received)

    def add_up(self, rows: Tensor) -> Tensor:
        """Send rows back and add those of each token in fp32; return [tokens, …]."""
        back = self.send_back(rows)
        total = torch.zeros(self.num_tokens, *rows.shape[1:])
        return total.index_add(0, self.token, back.float()).to(rows.dtype)


def check_slots(experts: Tensor, weights: Tensor, num_experts: int) -> None:
    """Check expert indices and weights, [tokens, k] each: kernels read them by pointer, and no expert comes twice."""
    assert experts.is_contiguous()
    assert weights.is_contiguous()
    assert (experts.dtype, weights.dtype, experts.shape) == (torch.int64, torch.float32, weights.shape)
    assert ((experts >= -1) & (experts < num_experts)).all()
    assert (multihot(experts, num_experts).sum(dim=1) == (experts >= 0).sum(dim=1)).all()


def multihot(experts: Tensor, num_experts: int, values: Tensor | None = None) -> Tensor:
    """Return [tokens, experts], with `values`, or else True, at the indices [tokens, k] that are not -1."""
    values = torch.ones_like(experts, dtype=torch.bool) if values is None else values
    return values.new_zeros(len(experts), num_experts + 1).scatter(1, experts + 1, values)[:, 1:]


def fused_dispatch(
    x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, group: ProcessGroup, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Plan]:
    """DeepEP: send a token once to each rank with a selected expert."""
    check_slots(experts, weights, num_experts)
    plan = Plan.of(group, multihot(experts, num_experts).view(len(x), group.size(), -1).any(dim=-1))
    num_local = num_experts // group.size()
    rows, experts, weights = (plan.send(values[plan.token]) for values in (x, experts, weights))
    experts = experts - group.rank() * num_local
    is_elsewhere = (experts < 0) | (experts >= num_local)
    experts = experts.masked_fill(is_elsewhere, -1)
    counts = multihot(experts, num_local).sum(dim=0)
    return rows, experts, weights.masked_fill(is_elsewhere, 0), counts, plan


def fused_combine(x: Tensor, group: ProcessGroup, handle: Plan, **_: Any) -> tuple[Tensor, None]:
    """DeepEP: add up the rows of each token."""
    return handle.add_up(x), None


def hybrid_ep_dispatch(
    *, x: Tensor, routing_map: Tensor, probs: Tensor, group: ProcessGroup, **_: Any
) -> tuple[Tensor, Tensor, None, Tensor, Plan]:
    """HybridEP: send a token by its routing map, and order rows by expert, without rows of padding."""
    # The library gathers the routing maps of all ranks, which must have the same shape.
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(group.size())]
    torch.distributed.all_gather(sizes, torch.tensor([len(x)]), group=group)
    assert len(set(map(int, sizes))) == 1
    plan = Plan.of(group, routing_map)
    return plan.send(x[plan.token]), plan.send(probs[plan.token, plan.destination]), None, plan.counts, plan


def hybrid_ep_combine(*, x: Tensor, handle: Plan, **_: Any) -> Tensor:
    """HybridEP: add up the rows of each token."""
    return handle.add_up(x)


_nccl_ep = SimpleNamespace()


def ensure_nccl_ep_bootstrapped(ep_group: ProcessGroup, **_: Any) -> None:
    """NCCL-EP: remember the group, which later calls do not get."""
    _nccl_ep.group = ep_group


def nccl_ep_dispatch(
    buffer: SimpleNamespace, tokens: Tensor, experts: Tensor, weights: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """NCCL-EP: send a token to each selected expert, into a buffer of fixed size."""
    num_experts = _nccl_ep.group.size() * buffer.num_local_experts
    check_slots(experts, weights, num_experts)
    buffer.plan = plan = Plan.of(_nccl_ep.group, multihot(experts, num_experts))
    unused = buffer.recv_capacity_per_rank - len(plan.order)
    assert unused >= 0, "the library aborts the process"
    weights = multihot(experts, num_experts, weights)[plan.token, plan.destination]
    # The library leaves the remaining rows of its buffers as they are.
    rows, weights = (
        torch.cat([received, received.new_full((unused, *received.shape[1:]), torch.nan)])
        for received in (plan.send(tokens[plan.token]), plan.send(weights))
    )
    return rows, plan.counts.int(), weights


def nccl_ep_combine(buffer: SimpleNamespace, rows: Tensor, **_: Any) -> Tensor:
    """NCCL-EP: add up the rows of each token."""
    return buffer.plan.add_up(rows[: len(buffer.plan.order)])


def ep_bootstrap(ep_group: ProcessGroup) -> None: ...


def ep_dispatch(buffer: SimpleNamespace, tokens: Tensor, *, recv_tokens: Tensor | None = None) -> None: ...


te_ep = SimpleNamespace(
    tex=SimpleNamespace(ep_initialize=None),
    ep_bootstrap=ep_bootstrap,
    ep_dispatch=ep_dispatch,
    ep_finalize=lambda: None,
)
"""Stands for Transformer Engine 2.18 with NCCL-EP; no test calls its functions."""


def install() -> None:
    """Let Megatron's managers call the stand-ins."""
    fused_a2a.HAVE_DEEP_EP = fused_a2a.HAVE_HYBRIDEP = fused_a2a.HAVE_TE_EP = True
    fused_a2a.te_ep = te_ep
    functions = (fused_dispatch, fused_combine, hybrid_ep_dispatch, hybrid_ep_combine, nccl_ep_dispatch)
    for function in (*functions, nccl_ep_combine, ensure_nccl_ep_bootstrapped):
        setattr(token_dispatcher, function.__name__, function)
    token_dispatcher.new_nccl_ep_buffer = SimpleNamespace
    token_dispatcher.set_deepep_num_sms = lambda num_sms: None
