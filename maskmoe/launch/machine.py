"""Finds the GPUs, CPU cores and network addresses of this machine."""

import ipaddress
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from maskmoe.data.parallel import available_cores

_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"
_CPU_PROCESSES = 2
# Device files of the drivers of NVIDIA, of NVIDIA's Tegra, of AMD, and of Windows Subsystem for Linux.
_GPU_DEVICE_FILES = ("nvidia*", "nvhost-gpu", "nvgpu", "kfd", "dxg")

_ELSEWHERE = "192.0.2.1"  # an address of documentation (RFC 5737), which is no host

# Let glibc take huge pages for tensors. Fewer misses of the address cache save 5 to 10 % of a small model's processor
# time. Other C libraries ignore the variable.
_CPU_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

# Megatron requires one connection for tensor and context parallelism on GPUs before Blackwell.
GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
"""The environment variables that a training process on a GPU needs."""


@dataclass(frozen=True)
class Devices:
    """The GPUs and CPU cores of this machine.

    Attributes:
        num_gpus: The number of CUDA devices that torch can use.
        num_cores: The number of CPU cores that this process may use.
    """

    num_gpus: int
    num_cores: int

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment variables of a training process."""
        if self.num_gpus:
            return GPU_ENVIRONMENT
        return {"OMP_NUM_THREADS": str(max(1, self.num_cores // _CPU_PROCESSES)), **_CPU_ENVIRONMENT}

    @property
    def megatron_flags(self) -> list[str]:
        """Megatron's flags that depend on the device, valid for every entry point."""
        return ["--bf16"] if self.num_gpus else ["--num-workers", "0"]


def find_devices() -> Devices:
    """Return the devices of this machine."""
    return Devices(num_gpus=_count_gpus(), num_cores=available_cores())


def _count_gpus() -> int:
    """Return the number of GPUs that torch can use. A separate process imports torch, to keep this process small."""
    # Importing torch takes seconds. On Linux, a GPU's driver has a device file.
    if sys.platform == "linux" and not any(any(Path("/dev").glob(name)) for name in _GPU_DEVICE_FILES):
        return 0
    command = [sys.executable, "-P", "-c", _COUNT_GPUS]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(completed.stdout) if completed.returncode == 0 else 0


@dataclass(frozen=True)
class Route:
    """This node's end of the network route to another host.

    Attributes:
        address: This node's address on the route.
        interface: The network interface with this address; None if it is unknown.
    """

    address: str
    interface: str | None


def route_to(host: str, port: int) -> Route | None:
    """Return the network route to a host, without sending anything.

    Many systems give their own name an address of the loopback (Debian: 127.0.1.1). Other nodes know this host by
    another address, so the route is then the default route.

    Returns:
        None if the host's name cannot be resolved, or if the route is this machine's loopback.
    """
    name = host.strip("[]")
    own_address = _own_address(name, port)
    if _is_loopback(own_address) and not _is_loopback(name):
        own_address = _own_address(_ELSEWHERE, port)
    if own_address is None or _is_loopback(own_address):
        return None
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == own_address for address in addresses):
            return Route(own_address, interface)
    return Route(own_address, None)


def _own_address(host: str, port: int) -> str | None:
    """Return the address from which this machine would send to a host; None if the host cannot be reached."""
    # Connecting a datagram socket only makes the system choose the address.
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None


def _is_loopback(host: str | None) -> bool:
    """Return whether a host is named as this machine's loopback."""
    with suppress(ValueError):
        return ipaddress.ip_address(host or "").is_loopback
    return host == "localhost"
