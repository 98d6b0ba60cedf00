"""Finds the GPUs and CPU cores of this machine, and the flags that suit them."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_CPU_PROCESSES = 2
_CPU_FLAGS = ("--num-workers", "0")
# Let glibc take huge pages for tensors. Fewer misses of the address cache save 5 to 10 % of a small model's processor
# time. Other C libraries ignore the variable.
_CPU_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_GPU_FLAGS = ("--bf16",)
# Device files of the drivers of NVIDIA, of NVIDIA's Tegra, of AMD, and of Windows Subsystem for Linux.
_GPU_DEVICE_FILES = ("nvidia*", "nvhost-gpu", "nvgpu", "kfd", "dxg")

# Megatron requires one connection for tensor and context parallelism on GPUs before Blackwell.
GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""The environment variables that a training process on a GPU needs."""


@dataclass(frozen=True)
class Devices:
    """The GPUs and CPU cores of this machine.

    Attributes:
        num_gpus: the number of CUDA devices that torch can use.
        num_cores: the number of CPU cores that this process may use.
    """

    num_gpus: int
    num_cores: int

    @property
    def num_processes(self) -> int:
        """The number of processes to train with: one for each GPU, or 2 on a machine without GPUs."""
        return self.num_gpus or _CPU_PROCESSES

    def expert_model_parallel_size(self, num_experts: int) -> int:
        """Return the largest expert parallel size that divides both the processes and the experts."""
        return math.gcd(self.num_processes, num_experts)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of a training process."""
        if self.num_gpus:
            return GPU_ENVIRONMENT
        return {"OMP_NUM_THREADS": str(max(1, self.num_cores // self.num_processes)), **_CPU_ENVIRONMENT}

    @property
    def megatron_flags(self) -> list[str]:
        """Megatron's flags that depend on the device, valid for every entry point."""
        return [*(_GPU_FLAGS if self.num_gpus else _CPU_FLAGS)]


def find_devices() -> Devices:
    """Return the devices of this machine."""
    return Devices(
        num_gpus=_count_gpus(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def _count_gpus() -> int:
    """Return the number of GPUs that torch can use. A separate process imports torch, to keep this process small."""
    # Importing torch takes seconds. On Linux, a GPU's driver has a device file.
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _GPU_DEVICE_FILES):
        return 0
    command = [sys.executable, "-P", "-c", _COUNT_GPUS]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(completed.stdout) if completed.returncode == 0 else 0
