"""Count the CUDA kernels that a piece of work launches and the waits of its host, by torch.profiler."""

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

_WORK = "measured work"
_WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "CtxSynchronize")


@dataclass(frozen=True)
class DeviceCost:
    """The costs of a piece of work for a GPU and its host. All counts are 0 without a GPU.

    Attributes:
        kernels: kernels, NCCL's included.
        copies: copies and fills of memory by the driver.
        host_waits: how often the host waited for the device.
        device_seconds: sum of the durations of all kernels and copies.
    """

    kernels: int = 0
    copies: int = 0
    host_waits: int = 0
    device_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.kernels} kernels and {self.copies} copies in {1e3 * self.device_seconds:.2f} ms, "
            f"{self.host_waits} host waits"
        )


def device_cost_of(work: Callable[[], object]) -> DeviceCost:
    """Do the work twice, forward and backward passes included, and return the cost of the second time."""
    work()
    torch.cuda.synchronize()
    with profile() as profiler:
        with record_function(_WORK):
            work()
        # The wait for the last kernel is outside of the work.
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return cost_in_trace(json.loads(path.read_text())["traceEvents"])


def cost_in_trace(events: Iterable[Mapping[str, Any]]) -> DeviceCost:
    """Return the cost of the measured work in the events of a Chrome trace.

    Args:
        events: `cat` is the kind of an event, `ts` its start and `dur` its duration in microseconds.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    (work,) = (event for event in complete if event.get("cat") == "user_annotation" and event["name"] == _WORK)
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    copies = [event for event in complete if event.get("cat") in ("gpu_memcpy", "gpu_memset")]
    calls = [
        event["name"]
        for event in complete
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and 0 <= event["ts"] - work["ts"] <= work["dur"]
    ]
    return DeviceCost(
        kernels=len(kernels),
        copies=len(copies),
        host_waits=sum(name == "cudaMemcpy" or any(wait in name for wait in _WAITS) for name in calls),
        device_seconds=sum(event["dur"] for event in kernels + copies) / 1e6,
    )
