"""A stand-in for DeepEP, whose kernels need GPUs, in Megatron's flex dispatcher: the same results on gloo ranks."""

from typing import Any

import torch
from megatron.core.transformer.moe import fused_a2a, token_dispatcher
from torch import Tensor
from torch.distributed.nn.functional import all_gather, all_reduce


def install() -> None:
    """Replace DeepEP's functions in this process."""
    fused_a2a.HAVE_DEEP_EP = True
    token_dispatcher.fused_dispatch, token_dispatcher.fused_combine = dispatch, combine
    token_dispatcher.set_deepep_num_sms = lambda num_sms: None


def multihot(experts: Tensor, num_experts: int, values: Tensor | None = None) -> Tensor:
    """Return [tokens, experts], with `values`, or else True, at the indices [tokens, k] that are not -1."""
    values = torch.ones_like(experts, dtype=torch.bool) if values is None else values
    return values.new_zeros(len(experts), num_experts + 1).scatter(1, experts + 1, values)[:, 1:]


def dispatch(x: Tensor, experts: Tensor, weights: Tensor, num_experts: int, group: Any, **_: Any) -> Any:
    """Send each token to the ranks of its experts; refuse what the kernels would read wrongly."""
    assert experts.is_contiguous()
    assert weights.is_contiguous()
    assert (experts.dtype, weights.dtype, experts.shape) == (torch.int64, torch.float32, weights.shape)
    assert (multihot(experts, num_experts).sum(dim=1) == (experts >= 0).sum(dim=1)).all()  # no expert comes twice
    num_local = num_experts // group.size()
    rows, experts, weights = (torch.cat(all_gather(tensor, group)) for tensor in (x, experts, weights))
    experts = experts - group.rank() * num_local
    is_elsewhere = (experts < 0) | (experts >= num_local)
    experts = experts.masked_fill(is_elsewhere, -1)
    token = (~is_elsewhere).any(dim=1).nonzero().flatten()
    counts = multihot(experts, num_local).sum(dim=0)
    return rows[token], experts[token], weights.masked_fill(is_elsewhere, 0)[token], counts, (token, x)


def combine(x: Tensor, group: Any, handle: tuple[Tensor, Tensor], **_: Any) -> tuple[Tensor, None]:
    """Add up the rows of each token."""
    token, own = handle
    rows = all_reduce(x.new_zeros(len(own) * group.size(), *x.shape[1:]).index_add(0, token, x), group=group)
    return rows.chunk(group.size())[group.rank()], None
