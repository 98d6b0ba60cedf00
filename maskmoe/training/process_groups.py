"""The end of a process's groups."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def temporary_process_groups() -> Iterator[None]:
    """Destroy the process groups when the block succeeds or ends by `sys.exit`, as Megatron's training loop may end.

    At exit, gloo's threads could outlive the memory that they use and abort the process after all work is done.
    """
    try:
        yield
    finally:
        if isinstance(sys.exception(), SystemExit | None) and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
