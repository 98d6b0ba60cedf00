"""Compiles the kernels that a case launches for GPUs that are not there, and prints the kernels' names.

    python compile_kernels.py CASE

The process must not have TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable

import torch
from support.kernels import compiled_launches


def compile_grouped_products() -> None:
    """Compile the products of experts with and without tensor cores."""
    from maskmoe.transformer.kernels.grouped_linear import grouped_linear

    ends = torch.zeros(3, dtype=torch.int32)
    for dtype in (torch.bfloat16, torch.float32):
        rows = torch.zeros(512, 72, dtype=dtype, requires_grad=True)
        weights = [torch.zeros(264, 72, dtype=dtype, requires_grad=True) for _ in range(3)]
        grouped_linear(rows, ends, weights).sum().backward()


CASES: dict[str, Callable[[], object]] = {"grouped products": compile_grouped_products}
"""Functions that launch kernels, by name. A case imports what it needs itself."""


if __name__ == "__main__":
    with compiled_launches() as names:
        CASES[sys.argv[1]]()
    print(*names)
