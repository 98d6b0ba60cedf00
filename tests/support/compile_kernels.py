"""Compiles the kernels that a case launches for GPUs that are not there, and prints the kernels' names.

    python compile_kernels.py CASE

The process must not have TRITON_INTERPRET=1.
"""

import sys
from collections.abc import Callable

from support.kernels import compiled_launches

CASES: dict[str, Callable[[], object]] = {}
"""Functions that launch kernels, by name. A case imports what it needs itself."""


if __name__ == "__main__":
    with compiled_launches() as names:
        CASES[sys.argv[1]]()
    print(*names)
