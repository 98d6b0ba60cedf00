"""Lets a CPU take the branches of GPUs, so that tests of GPUs can fail on a machine without one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def take_gpu_branches(replace: Callable[[Any, str, Any], None] = setattr) -> None:
    """Let models take the branches of GPUs while their tensors are on the CPU; `replace` sets an attribute."""
    replace(Tensor, "is_cuda", True)
    # The capability of Hopper, for which torch has a kernel of `grouped_mm`.
    replace(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
