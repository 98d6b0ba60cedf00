"""Show that torch computes on the GPUs: `python -m gpu_campaign.probe FILE` writes facts about this machine to FILE.

The program fails if there are GPUs that torch does not use. Without GPUs it states so.
"""

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from device_meter import device_cost_of

from maskmoe.errors import RunFailure
from maskmoe.megatron_compat import cpu, prepare_process
from maskmoe.processes.run_tool import run_tool

_TERAFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "GB200": 2500.0, "B200": 2250.0}
"""Dense bf16 operations per second of GPUs on NVLink by their names, in units of 1e12; torch's table is private."""

_PACKAGES = ("megatron-core", "transformer-engine", "apex", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


def main() -> None:
    """Multiply matrices on every GPU, and write what was found."""
    prepare_process()  # refuses GPUs that torch cannot use
    facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    facts |= {name: _version(name) for name in _PACKAGES if _version(name)}
    facts["CPU cores"] = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cpu.is_installed():
        check_no_gpu_is_missed()
        facts["GPUs"] = 0
    else:
        facts |= {"GPUs": torch.cuda.device_count(), "CUDA of torch": torch.version.cuda}
        facts["bf16 TFLOP/s of a GPU"] = datasheet_teraflops(torch.cuda.get_device_name())
        for number in range(torch.cuda.device_count()):
            facts |= describe(number)
    Path(sys.argv[1]).write_text(json.dumps(facts, indent=2))


def check_no_gpu_is_missed() -> None:
    """Raise a RunFailure if the driver has device files of GPUs that torch does not see, unless the user hid them."""
    files = sorted(Path("/dev").glob("nvidia[0-9]*"))
    if files and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise RunFailure(
            f"the machine has the GPUs {', '.join(map(str, files))}, but torch {torch.__version__} (CUDA: "
            f"{torch.version.cuda}) sees none: install a torch for CUDA, or set CUDA_VISIBLE_DEVICES to nothing"
        )


def datasheet_teraflops(name: str) -> float | None:
    """Return the dense bf16 operations per second of a GPU on NVLink, in units of 1e12; None if they are not known."""
    return next((teraflops for model, teraflops in _TERAFLOPS.items() if model in name), None)


def describe(number: int) -> dict[str, Any]:
    """Compute on a GPU, and return facts about it.

    Raises:
        RunFailure: the result is wrong, or the profiler sees no kernel.
    """
    with torch.cuda.device(number):
        ones = torch.ones(1024, 1024, device="cuda", dtype=torch.bfloat16)
        product = ones @ ones
        if not product.is_cuda or not bool((product == 1024).all()):
            raise RunFailure(f"GPU {number} multiplies matrices wrongly")
        cost = device_cost_of(lambda: ones @ ones)
        if cost.kernels == 0:
            raise RunFailure("the profiler sees no kernels: counts of kernels and waits would all be 0")
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info()
    return {
        f"GPU {number}": properties.name,
        f"GPU {number}, compute capability": f"{properties.major}.{properties.minor}",
        f"GPU {number}, memory": f"{free / 2**30:.0f} GiB of {total / 2**30:.0f} GiB free",
        f"GPU {number}, one matrix product": str(cost),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_tool(main)
