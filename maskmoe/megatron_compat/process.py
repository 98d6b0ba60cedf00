"""Prepares a process for Megatron-Core."""

import functools

import torch

from maskmoe.megatron_compat import cpu, patches


@functools.cache
def prepare_process() -> None:
    """Install the CPU adapter if there is no GPU, then patch Megatron-Core; further calls do nothing.

    Raises:
        RuntimeError: there is no GPU, and megatron was imported before: its modules hold what the adapter replaces.
    """
    if not torch.cuda.is_available():
        cpu.install()
    patches.apply()
