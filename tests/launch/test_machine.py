"""The addresses of this machine, and the wait for node 0."""

import socket

import pytest

from maskmoe.errors import UserError
from maskmoe.launch.machine import listen, route_to, wait_for


def test_loopback_and_unknown_hosts_have_no_route():
    assert route_to("localhost", 1) is None
    assert route_to("no-such-host.invalid", 1) is None


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_listener_answers_on_both_versions_of_ip(address):
    with listen() as server:
        socket.create_connection((address, server.getsockname()[1]), timeout=5).close()


def test_error_names_the_unreachable_rendezvous():
    with pytest.raises(UserError, match=r"node 0 cannot be reached at 127\.0\.0\.1:1 after 0.1 s"):
        wait_for("127.0.0.1", 1, 0.1)
