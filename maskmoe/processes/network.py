"""Asks whether a process listens at an address."""

import socket

_CONNECT_TIMEOUT = 5.0  # seconds for one attempt to connect


def connection_error(host: str, port: int) -> OSError | None:
    """Try to connect to an address; return the error, or None if a process listens there."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=_CONNECT_TIMEOUT).close()
    except OSError as error:
        return error
    return None
