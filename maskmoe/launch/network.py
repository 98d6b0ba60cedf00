"""By which address and network interface a node reaches the others."""

import ipaddress
import socket
import time
from dataclasses import dataclass

import psutil

from maskmoe.errors import UserError

_PAUSE = 1.0  # seconds between attempts to connect


@dataclass(frozen=True)
class Route:
    """This node's side of the way to another host.

    Attributes:
        address: this node's.
        interface: the network interface that has it; None if that cannot be told.
    """

    address: str
    interface: str | None


def route_to(host: str, port: int) -> Route | None:
    """The way to a host; None if its name means nothing here, or this node itself by a loopback address.

    Nothing is sent: the system is only asked which address it would send from.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None
    if ipaddress.ip_address(own).is_loopback:
        return None
    interfaces = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address.partition("%")[0] == own for address in addresses)
    ]
    return Route(own, interfaces[0] if len(interfaces) == 1 else None)


def wait_for(host: str, port: int, timeout: float) -> None:
    """Return once something listens at an address.

    Raises:
        UserError: nothing did within the timeout, in seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=_PAUSE * 5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"node 0 cannot be reached at {host}:{port} after {timeout:g} s ({error.strerror or error}): check "
                    "that the run was started there, and --rendezvous"
                ) from error
        time.sleep(_PAUSE)
