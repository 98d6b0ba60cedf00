"""Lets a CPU take the branches of GPUs, so that tests of GPUs can fail on a machine without one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from maskmoe.transformer.dispatch import rows


def take_gpu_branches(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let models take the branches of GPUs while their tensors are on the CPU; `replace` sets an attribute."""
    replace(rows, "_is_on_cpu", lambda tensor: False)
    replace(rows, "embedding_bag", _rounded_embedding_bag)
    replace(Tensor, "is_cuda", True)


def _rounded_embedding_bag(order: Tensor, values: Tensor, offsets: Tensor, mode: str) -> Tensor:
    """Round sums of bf16 as the kernel of GPUs does; the kernel of CPUs truncates them."""
    terms = values.float() if values.dtype == torch.bfloat16 else values
    return embedding_bag(order, terms, offsets, mode=mode).to(values.dtype)
