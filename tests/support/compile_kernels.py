"""Compiles the kernels that a case launches for GPUs that are not there, and prints the kernels' names.

    python compile_kernels.py CASE

The process must not have TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable

import torch
from support.kernels import compiled_launches

from maskmoe.megatron_compat import prepare_process


def copy_rows() -> None:
    """Launch the kernels of `SlottedCopies`."""
    from maskmoe.transformer.dispatch.rows import copies_of_map

    chosen = torch.ones(100, 40, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float32):
        copies = copies_of_map(chosen, 800, 8, slice(8, 16))
        copies.sum_copies(copies.copy_rows(torch.ones(100, 64, dtype=dtype)))


def multiply_groups() -> None:
    """Launch the products of experts with and without tensor cores."""
    from maskmoe.transformer.kernels.grouped_linear import grouped_linear

    ends = torch.zeros(3, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.zeros(512, 72, dtype=dtype, requires_grad=True)
        weights = [torch.zeros(264, 72, dtype=dtype, requires_grad=True) for _ in range(3)]
        grouped_linear(rows, ends, weights).sum().backward()


CASES: dict[str, Callable[[], object]] = {"row copies": copy_rows, "grouped products": multiply_groups}
"""Functions that launch kernels, by name. A case imports what it needs itself."""


if __name__ == "__main__":
    prepare_process()
    with compiled_launches() as names:
        CASES[sys.argv[1]]()
    print(*names)
