"""Decides where Triton kernels run, and launches them.

The modules with kernels import Triton, so their users import these modules only where `runs_kernels` is True.
"""

import importlib.util
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor


def runs_kernels(tensor: Tensor) -> bool:
    """Return whether kernels compute on a tensor: Triton can use the tensor's GPU, and MASKMOE_TRITON is not 0."""
    return tensor.is_cuda and _has_triton()


@cache
def _has_triton() -> bool:
    # Triton compiles for older GPUs too, but to code without tensor cores that spills registers.
    is_supported = not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0)
    return is_supported and os.environ.get("MASKMOE_TRITON") != "0" and importlib.util.find_spec("triton") is not None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the current stream; an empty grid launches nothing.

    Args:
        kernel: a function with `triton.jit`.
        grid: the number of programs along each axis.
        arguments: the kernel's arguments.
        constants: the kernel's `tl.constexpr` arguments, and Triton's options such as `num_warps`.
    """
    if 0 not in grid:
        kernel[grid](*arguments, **constants)
