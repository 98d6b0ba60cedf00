"""Makes Megatron-Core run here: the CPU adapter, and the patches of Megatron-Core and torch.

`cpu` is the adapter. `process_patches` are for every process, `training_patches` for processes that train, and
`checkpoint_patches` concern checkpoints. `globals` gives access to Megatron's global variables.

Importing this package changes nothing. Each process calls `prepare_process` once, before it imports megatron.
"""

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from maskmoe.errors import UserError
from maskmoe.processes.interruption import RANK_PROCESS, end_with_parent


@functools.cache
def prepare_process() -> None:
    """Install the CPU adapter if there is no GPU, then patch Megatron-Core and torch; further calls do nothing.

    A process that writes checkpoints ends with its rank from now on.

    Raises:
        UserError: There are GPUs that torch cannot use, so training on them would become training on the CPU.
        RuntimeError: There is no GPU, and megatron was imported before.
    """
    from maskmoe.megatron_compat import cpu

    has_own_log = logging.root.hasHandlers()
    if RANK_PROCESS in os.environ:
        end_with_parent(int(os.environ[RANK_PROCESS]))
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
    # These modules import megatron, so they must come after the CPU adapter.
    from megatron.training import training

    from maskmoe.megatron_compat import checkpoint_patches, process_patches

    # emerging-optimizers logs by absl while Megatron imports it, and absl then gives the root logger a handler, beside
    # which `megatron.training` installs none, so that its lines of level INFO would vanish. The handlers of a script
    # that has set up its log before this call remain.
    if not has_own_log and not any(isinstance(handler, training.CustomHandler) for handler in logging.root.handlers):
        logging.basicConfig(handlers=[training.CustomHandler()], level=logging.INFO, force=True)
    for patch in (*process_patches.EVERY_PROCESS, *checkpoint_patches.EVERY_PROCESS):
        patch()


def replace(owner: object, name: str, replacement: object) -> None:
    """Set an existing attribute of a module or class of Megatron-Core or torch.

    Raises:
        AttributeError: There is nothing to replace: the patch was written for another version.
    """
    getattr(owner, name)
    setattr(owner, name, replacement)


@contextmanager
def replacing(owner: object, **replacements: object) -> Iterator[None]:
    """Replace attributes of a module or class, given by name, during a block, see `replace`."""
    stock = {name: getattr(owner, name) for name in replacements}
    for name, replacement in replacements.items():
        replace(owner, name, replacement)
    try:
        yield
    finally:
        for name, value in stock.items():
            setattr(owner, name, value)
