"""Makes Megatron-Core run here: the CPU adapter, and the patches of Megatron-Core and torch.

Importing this package changes nothing. Each process that uses Megatron calls `prepare_process` once, before it imports
megatron.
"""

import functools

import torch

from maskmoe.megatron_compat import cpu, patches


@functools.cache
def prepare_process() -> None:
    """Install the CPU adapter if there is no GPU, then patch Megatron-Core and torch; further calls do nothing.

    Raises:
        RuntimeError: There is no GPU, and megatron was imported before. Its modules hold what the adapter replaces.
    """
    if not torch.cuda.is_available():
        cpu.install()
    # This module imports megatron, so it must come after the CPU adapter.
    from maskmoe.checkpoint import megatron_patches

    for patch in (*patches.EVERY_PROCESS, *megatron_patches.EVERY_PROCESS):
        patch()
