"""Stand-ins on the CPU for the libraries of Megatron's flex dispatcher: DeepEP, HybridEP and NCCL-EP.

The stand-ins have the interface that Megatron-Core 0.19.2 calls: that of DeepEP 1.2.1, of DeepEP's branch hybrid-ep,
and of Transformer Engine 2.18. They send rows over the process group's own all-to-all, and refuse what the libraries
refuse or what their documentation rules out. `install` lets Megatron import the stand-ins, so that Megatron's own code
around the libraries runs unchanged.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

# The libraries send bf16 only. Comparisons to the last bit of fp32 need another type.
token_dtype = torch.bfloat16


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


def check(tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Check what kernels need of a tensor that they address by pointer."""
    assert tensor.is_contiguous()
    assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)


def check_tokens(tokens: Tensor, multiple: int) -> None:
    """Check the properties that all libraries need of hidden states."""
    check(tokens, token_dtype, len(tokens), tokens.shape[-1])
    assert tokens.shape[1] % multiple == 0


def check_slots(experts: Tensor, weights: Tensor, num_experts: int) -> None:
    """Check expert indices and weights, [tokens, k] each; no expert may be named twice."""
    check(experts, torch.int64, len(experts), experts.shape[-1])
    check(weights, torch.float32, *experts.shape)
    assert ((experts >= -1) & (experts < num_experts)).all()
    assert (multihot(experts, num_experts).sum(dim=1) == (experts >= 0).sum(dim=1)).all()


def multihot(experts: Tensor, num_experts: int, values: Tensor | None = None) -> Tensor:
    """Return [tokens, experts], with `values`, or else True, at the indices [tokens, k] that are not -1."""
    values = torch.ones_like(experts, dtype=torch.bool) if values is None else values
    return values.new_zeros(len(experts), num_experts + 1).scatter(1, experts + 1, values)[:, 1:]


# DeepEP


class EventHandle:
    """An event of a stream."""


@dataclass(frozen=True)
class EventOverlap:
    """An event that a stream can wait for."""

    event: EventHandle | None = None

    def current_stream_wait(self) -> None: ...


class Buffer:
    """`deep_ep.Buffer`: sends a token once to each rank with a selected expert."""

    num_sms = 20

    def __init__(self, group: ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @classmethod
    def set_num_sms(cls, num_sms: int) -> None:
        assert num_sms % 2 == 0
        cls.num_sms = num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> SimpleNamespace:
        def size_hint(hidden_bytes: int, num_ranks: int) -> int:
            return hidden_bytes * num_ranks

        return SimpleNamespace(get_nvl_buffer_size_hint=size_hint, get_rdma_buffer_size_hint=lambda *_: 0)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **events: Any) -> tuple[Any, ...]:
        self._check_events(**events)
        check_slots(topk_idx, torch.zeros(topk_idx.shape), num_experts)
        selected = multihot(topk_idx, num_experts)
        is_token_in_rank = selected.view(len(selected), self.group.size(), -1).any(dim=-1)
        counts = (is_token_in_rank.sum(dim=0).int(), None, selected.sum(dim=0).int())
        return *counts, is_token_in_rank, EventOverlap(EventHandle())

    def dispatch(
        self,
        x: Tensor,
        handle: Plan | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **events: Any,
    ) -> tuple[Any, ...]:
        self._check_events(**events)
        check_tokens(x, 16 // x.element_size())
        if handle is not None:
            assert topk_idx is topk_weights is None
            return handle.send(x[handle.token]), None, None, None, None, EventOverlap()
        check(is_token_in_rank, torch.bool, len(x), self.group.size())
        check(num_tokens_per_rank, torch.int32, self.group.size())
        check(num_tokens_per_expert, torch.int32, len(num_tokens_per_expert))
        assert len(topk_idx) == len(x)
        check_slots(topk_idx, topk_weights, len(num_tokens_per_expert))
        plan = Plan.of(self.group, is_token_in_rank)
        num_local = len(num_tokens_per_expert) // self.group.size()
        received_x, experts, weights = (plan.send(rows[plan.token]) for rows in (x, topk_idx, topk_weights))
        experts = experts - self.group.rank() * num_local
        experts = experts.masked_fill((experts < 0) | (experts >= num_local), -1)
        weights = weights.masked_fill(experts < 0, 0)
        return received_x, experts, weights, multihot(experts, num_local).sum(dim=0).tolist(), plan, EventOverlap()

    def combine(
        self, x: Tensor, handle: Plan, topk_weights: Tensor | None = None, **events: Any
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        self._check_events(**events)
        check_tokens(x, 16 // x.element_size())
        assert len(x) == sum(handle.received)
        if topk_weights is not None:
            check(topk_weights, torch.float32, len(x), topk_weights.shape[-1])
            topk_weights = handle.add_up(topk_weights)
        return handle.add_up(x), topk_weights, EventOverlap()

    @staticmethod
    def _check_events(previous_event: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
        assert not allocate_on_comm_stream or (previous_event is not None and async_finish)


# HybridEP


class HybridEPBuffer:
    """`deep_ep.HybridEPBuffer`: sends a token by its routing map, and orders rows by expert."""

    def __init__(
        self,
        group: ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool,
        **kernel_settings: int,
    ) -> None:
        assert hidden_dim % 16 == num_local_experts * group.size() % 4 == 0
        assert not use_fp8
        self.group = group

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        scaling_factor: None,
        pad_multiple: None,
        num_permuted_tokens: Tensor | None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        non_blocking: bool = False,
        handle: Plan | None = None,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Tensor, Tensor | None, None, Tensor, Plan]:
        check_tokens(hidden, 8)
        if handle is not None:
            assert num_permuted_tokens == len(handle.order)
            return handle.send(hidden[handle.token]), None, None, handle.counts, handle
        assert not non_blocking
        check(routing_map, torch.bool, len(hidden), num_of_experts_per_rank * self.group.size())
        check(probs, torch.float32, *routing_map.shape)
        # The library gathers the routing maps of all ranks, which must have the same shape.
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.group.size())]
        torch.distributed.all_gather(sizes, torch.tensor([len(hidden)]), group=self.group)
        assert len(set(map(int, sizes))) == 1
        plan = Plan.of(self.group, routing_map)
        weights = plan.send(probs[plan.token, plan.destination])
        return plan.send(hidden[plan.token]), weights, None, plan.counts, plan

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        handle: Plan,
        pad_multiple: None,
        probs: Tensor | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_tokens(hidden, 8)
        assert len(hidden) == len(handle.order)
        if probs is not None:
            check(probs, torch.float32, len(hidden))
            rows = handle.send_back(probs)
            probs = torch.zeros(handle.num_tokens, self.group.size() * len(handle.counts))
            probs[handle.token, handle.destination] = rows
        return handle.add_up(hidden), probs


# NCCL-EP


class EpBuffer:
    """`transformer_engine.pytorch.ep.EpBuffer`: what one dispatch hands to its combine."""

    plan: Plan

    def __init__(
        self,
        top_k: int,
        max_tokens_per_rank: int,
        recv_capacity_per_rank: int,
        hidden_dim: int,
        num_local_experts: int,
        alignment: int = 0,
    ) -> None:
        assert te_ep._BOOTSTRAPPED
        assert alignment == 0
        self.top_k, self.num_local_experts = top_k, num_local_experts
        self.max_tokens, self.capacity, self.hidden_dim = max_tokens_per_rank, recv_capacity_per_rank, hidden_dim


def ep_bootstrap(
    ep_group: ProcessGroup,
    num_experts: int,
    max_tokens_per_rank: int,
    recv_capacity_per_rank: int,
    hidden_dim: int,
    max_num_sms: int = 0,
    zero_copy: bool = False,
) -> None:
    assert te_ep._BOOTSTRAPPED is zero_copy is False
    assert ep_group.size() >= 2
    assert num_experts % ep_group.size() == max_tokens_per_rank % 64 == 0
    assert recv_capacity_per_rank >= max_tokens_per_rank
    te_ep._BOOTSTRAPPED, te_ep.group = True, ep_group


def ep_finalize() -> None:
    te_ep._BOOTSTRAPPED = False


def ep_dispatch(
    buffer: EpBuffer,
    tokens: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor,
    *,
    recv_tokens: None = None,
    recv_topk_weights: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_tokens(tokens, 8)
    assert len(tokens) <= buffer.max_tokens
    assert tokens.shape[1] == buffer.hidden_dim
    assert topk_idx.shape == (len(tokens), buffer.top_k)
    num_experts = te_ep.group.size() * buffer.num_local_experts
    check_slots(topk_idx, topk_weights, num_experts)
    buffer.plan = plan = Plan.of(te_ep.group, multihot(topk_idx, num_experts))
    unused = buffer.capacity - len(plan.order)
    assert unused >= 0, "the library aborts the process"
    weights = multihot(topk_idx, num_experts, topk_weights)[plan.token, plan.destination]
    # The library leaves the remaining rows of its buffers as they are.
    rows, weights = (
        torch.cat([received, received.new_full((unused, *received.shape[1:]), torch.nan)])
        for received in (plan.send(tokens[plan.token]), plan.send(weights))
    )
    return rows, weights, plan.counts.int()


def ep_combine(
    buffer: EpBuffer, expert_out: Tensor, *, num_local_tokens: int | None = None, grad_out: None = None
) -> Tensor:
    check_tokens(expert_out, 8)
    assert expert_out.shape == (buffer.capacity, buffer.hidden_dim)
    assert num_local_tokens == buffer.plan.num_tokens
    return buffer.plan.add_up(expert_out[: len(buffer.plan.order)])


# Installation


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


te_ep: Any = _module(
    "ep",
    tex=SimpleNamespace(ep_initialize=None),
    _BOOTSTRAPPED=False,
    **{function.__name__: function for function in (EpBuffer, ep_bootstrap, ep_finalize, ep_dispatch, ep_combine)},
)


def install(tokens: torch.dtype = torch.bfloat16) -> None:
    """Let Megatron import the stand-ins.

    Args:
        tokens: The only type of hidden states that the stand-ins accept.
    """
    global token_dtype
    token_dtype = tokens
    libraries = {
        "deep_ep": _module("deep_ep", Buffer=Buffer, HybridEPBuffer=HybridEPBuffer),
        "deep_ep.utils": _module("utils", EventHandle=EventHandle, EventOverlap=EventOverlap),
        "transformer_engine": _module("transformer_engine"),
        "transformer_engine.pytorch": _module("pytorch", ep=te_ep),
    }
    with mock.patch.dict(sys.modules, libraries):
        importlib.reload(fused_a2a)
    for name, value in vars(fused_a2a).items():
        if not name.startswith("__") and hasattr(token_dispatcher, name):
            setattr(token_dispatcher, name, value)
