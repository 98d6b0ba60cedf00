"""Token ids of a micro-batch, and their transport from the model to the MoE layers.

Megatron-Core after 0.19 hands `input_ids` from a hybrid model's block to its layers, their recomputation and their MoE
layers, for its own hash routing (pull request 6403). The ids of MaskMoE take the same way. Older versions, the block of
`GPTModel` and multi-token prediction hand on only one tensor per token, `padding_mask`, so ids and padding are packed
into that tensor there:

- the ids alone: int64 [batch, sequence];
- ids and padding: int64 [2, batch, sequence], the second row is 1 where a token is padding.

The sequence is the last dimension in both cases, because multi-token prediction shifts the last dimension. The dispatch
plan is attached to the tensor that holds the ids. No other module knows how the ids travel.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.distributed import ProcessGroup

from maskmoe.transformer.dispatch.rows import LayerPlan

DispatchPlan = Mapping[int, LayerPlan]
"""The plan of a micro-batch for all layers of a pipeline stage, by the number of the mask's table that a layer uses."""


@dataclass(frozen=True)
class TokenIds:
    """The token ids that a layer or router works on.

    Attributes:
        ids: Int64, [batch, sequence] in a model, [sequence, batch] in a layer.
        is_padding: Bool of the same shape, True where a token is padding; None if no token is padding.
        plan: The dispatch plan made from these ids; None if dispatch is not planned.
    """

    ids: Tensor
    is_padding: Tensor | None = None
    plan: DispatchPlan | None = None

    @property
    def is_real(self) -> Tensor | None:
        """Return bool [tokens], True where a token is not padding; None if no token is padding."""
        return None if self.is_padding is None else ~self.is_padding.flatten()

    def transpose(self) -> "TokenIds":
        """Swap batch and sequence."""
        return TokenIds(self.ids.t(), None if self.is_padding is None else self.is_padding.t(), self.plan)


def takes_token_ids(module: type[torch.nn.Module]) -> bool:
    """Return whether a block or layer of Megatron-Core hands on token ids as an argument of their own."""
    return "input_ids" in inspect.signature(module.forward).parameters


def to_arguments(token_ids: TokenIds, block: type[torch.nn.Module]) -> dict[str, Tensor | None]:
    """Return the arguments with which a block hands token ids, padding [batch, sequence] and plan to its layers."""
    if takes_token_ids(block):
        return {"input_ids": _attach(token_ids.ids, token_ids.plan), "padding_mask": token_ids.is_padding}
    return {"padding_mask": pack_token_ids(token_ids)}


def from_arguments(padding_mask: Tensor | None, input_ids: Tensor | None) -> TokenIds | None:
    """Read the token ids of `to_arguments` in a layer; None if the arguments hold no ids."""
    if input_ids is not None:
        is_padding = None if padding_mask is None else padding_mask.bool()
        return TokenIds(input_ids.as_subclass(Tensor), is_padding, _plan_of(input_ids))
    # Without a MaskMoE model, the mask is Megatron-Core's own: it is bool and holds no ids.
    return None if padding_mask is None or padding_mask.dtype is torch.bool else unpack_token_ids(padding_mask)


def pack_token_ids(token_ids: TokenIds) -> Tensor:
    """Pack token ids and padding [batch, sequence], and plan, into the tensor that travels as `padding_mask`."""
    ids, is_padding = token_ids.ids, token_ids.is_padding
    return _attach(ids if is_padding is None else torch.stack([ids, is_padding.to(ids.dtype)]), token_ids.plan)


def unpack_token_ids(padding_mask: Tensor) -> TokenIds:
    """Read token ids, padding and plan from a tensor that `pack_token_ids` made."""
    plan = _plan_of(padding_mask)
    if padding_mask.dim() == 2:
        return TokenIds(padding_mask.as_subclass(Tensor), None, plan)
    ids, is_padding = padding_mask.unbind()
    return TokenIds(ids, is_padding.bool(), plan)


def split_sequence(padding_mask: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Return the part [..., sequence / tp] of a packed tensor that sequence parallelism assigns to this rank."""
    return padding_mask.chunk(get_pg_size(tp_group), dim=-1)[get_pg_rank(tp_group)]


def gather_sequence(padding_mask: Tensor, tp_group: ProcessGroup) -> Tensor:
    """Return the packed tensor [..., sequence] of the whole sequence from the parts of all tensor-parallel ranks."""
    sequence_first = padding_mask.movedim(-1, 0).contiguous()
    return gather_from_sequence_parallel_region(sequence_first, group=tp_group).movedim(0, -1)


def _attach(tensor: Tensor, plan: DispatchPlan | None) -> Tensor:
    """Return the tensor with the plan attached; the tensor itself if there is no plan."""
    if plan is None:
        return tensor
    with_plan = tensor.as_subclass(_TensorWithPlan)
    with_plan.plan = plan
    return with_plan


def _plan_of(tensor: Tensor) -> DispatchPlan | None:
    """Return the plan that is attached to a tensor, if any."""
    return tensor.plan if isinstance(tensor, _TensorWithPlan) else None


class _TensorWithPlan(Tensor):
    """A tensor of token ids with a dispatch plan attached.

    Megatron-Core's recomputation saves the tensor and hands a detached copy to the layers that run again, so `detach`
    keeps the plan. The result of any other operation has no plan, because the plan would not fit other ids.
    """

    plan: DispatchPlan

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation; keep the plan for `detach`, return plain tensors from all other operations."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if func is Tensor.detach:
            return _attach(result, args[0].plan)
        return result.as_subclass(Tensor) if type(result) is cls else result
