"""Makes Megatron-Core run here: the CPU adapter, and the patches of Megatron-Core and torch.

Importing this package changes nothing. Each process that uses Megatron calls `prepare_process` once, before it imports
megatron.
"""

import functools

import torch

from maskmoe.errors import UserError
from maskmoe.megatron_compat import cpu, patches


@functools.cache
def prepare_process() -> None:
    """Install the CPU adapter if there is no GPU, then patch Megatron-Core and torch; further calls do nothing.

    Raises:
        UserError: There are GPUs that torch cannot use, so training on them would become training on the CPU.
        RuntimeError: There is no GPU, and megatron was imported before. Its modules hold what the adapter replaces.
    """
    if not torch.cuda.is_available():
        # The driver's library counts GPUs even if the driver is too old for CUDA.
        if num_unusable := torch.cuda.device_count():
            raise UserError(
                f"torch {torch.__version__} cannot use the {num_unusable} GPUs of this machine, probably because their "
                "driver is too old: update the driver, or set the environment variable CUDA_VISIBLE_DEVICES to nothing "
                "to use the CPU"
            )
        if not cpu.is_installed():
            cpu.install()
    # This module imports megatron, so it must come after the CPU adapter.
    from maskmoe.checkpoint import megatron_patches

    for patch in (*patches.EVERY_PROCESS, *megatron_patches.EVERY_PROCESS):
        patch()
