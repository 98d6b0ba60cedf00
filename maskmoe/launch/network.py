"""Finds this node's address and network interface, and waits for node 0."""

import ipaddress
import socket
import time
from dataclasses import dataclass

import psutil

from maskmoe.errors import UserError

_PAUSE = 1.0  # seconds between attempts to connect
_CONNECT_TIMEOUT = 5.0  # seconds for one attempt to connect


@dataclass(frozen=True)
class Route:
    """This node's end of the network route to another host.

    Attributes:
        address: this node's address on the route.
        interface: the network interface with this address; None if not exactly one interface has the address.
    """

    address: str
    interface: str | None


def route_to(host: str, port: int) -> Route | None:
    """Return the network route to a host, without sending anything.

    Returns:
        None if the host's name cannot be resolved, or if the route is this machine's loopback.
    """
    # Connecting a datagram socket only makes the system choose the address that it would send from.
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            own_address = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None
    if ipaddress.ip_address(own_address).is_loopback:
        return None
    interfaces = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address.partition("%")[0] == own_address for address in addresses)
    ]
    return Route(own_address, interfaces[0] if len(interfaces) == 1 else None)


def listen(backlog: int | None = None) -> socket.socket:
    """Return a socket that listens at a free port, of IPv4 and of IPv6 where the system has both."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog, dualstack_ipv6=dual)


def connection_error(host: str, port: int) -> OSError | None:
    """Try to connect to an address; return the error, or None if a process listens there."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        return error
    return None


def wait_for(host: str, port: int, timeout: float) -> None:
    """Wait until node 0 listens at an address, and print that this node waits.

    Args:
        host: the host name or address.
        port: the port.
        timeout: the longest wait, in seconds.

    Raises:
        UserError: node 0 does not listen at the address within the timeout.
    """
    deadline, has_said = time.monotonic() + timeout, False
    while error := connection_error(host, port):
        if time.monotonic() > deadline:
            raise UserError(
                f"node 0 cannot be reached at {host}:{port} after {timeout:g} s ({error.strerror or error}): check "
                "that the run was started on node 0, and check --rendezvous"
            )
        if not has_said:
            print(f"launch: waiting for node 0 at {host}:{port}, at most {timeout:g} s", flush=True)
            has_said = True
        time.sleep(_PAUSE)
