"""The addresses of this machine."""

from unittest.mock import Mock

import psutil

from maskmoe.launch import machine
from maskmoe.launch.machine import Route, route_to


def test_loopback_and_unknown_hosts_have_no_route():
    assert route_to("localhost", 1) is None
    assert route_to("no-such-host.invalid", 1) is None


def test_name_with_an_address_of_the_loopback_has_the_default_route(monkeypatch):
    """As a Debian host resolves its own name."""
    addresses = {"head": "127.0.1.1", machine._ELSEWHERE: "10.0.0.5", "localhost": "127.0.0.1"}
    monkeypatch.setattr(machine, "_own_address", lambda host, port: addresses[host])
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth0": [Mock(address="10.0.0.5")]})
    assert route_to("head", 1) == Route("10.0.0.5", "eth0")
    assert route_to("localhost", 1) is None
