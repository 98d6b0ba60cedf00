"""Pretraining that lets Megatron-FSDP run on CPUs, although MaskMoE refuses its checkpoints.

Two modules of Megatron-FSDP name their device `cuda:{torch.cuda.current_device()}`, which is no device on a CPU.
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import os
from typing import Any

import torch
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.distributed.fsdp.src.megatron_fsdp import megatron_fsdp

from maskmoe.command_line.run_tool import run_tool
from maskmoe.training.settings import refused_settings
from maskmoe.training.trainer import main

ALLOWED = ("--use-megatron-fsdp or --use-torch-fsdp2", "--ckpt-format other than torch_dist")


class TorchOnCpu:
    """The module `torch`, in which every device is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def device(self, name: str) -> torch.device:
        return torch.device("cpu")


if __name__ == "__main__":
    os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS")  # Megatron-FSDP refuses one connection
    mcore_fsdp_adapter.torch = megatron_fsdp.torch = TorchOnCpu()
    kept = tuple(check for check in refused_settings.REFUSED_SETTINGS if check.name not in ALLOWED)
    refused_settings.REFUSED_SETTINGS = kept
    run_tool(main)
