"""Separate hosts on this machine, connected by a network of their own. Needs root and the command `ip`."""

import itertools
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from support.paths import ROOT
from support.system import HANDLERS, install_handlers, wait_until


class Host:
    """A host with its own network, host name, process table and /etc/hosts. It shares this machine's files.

    Attributes:
        name: the host name.
        address: the address in the network of all hosts.
    """

    # Process 1 reaps orphans. When process 1 ends, all processes of the host end.
    _BOOT = 'hostname "$1"; mount --bind "$2" /etc/hosts; ip link set lo up; sleep infinity & wait'

    def __init__(self, name: str, address: str, namespace: str, hosts_file: Path) -> None:
        self.name = name
        self.address = address
        self._boot = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--uts", "--pid", "--fork"]
        self._boot += ["--kill-child", "--mount-proc", "bash", "-c", self._BOOT, "boot", name, str(hosts_file)]
        self._unshare: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Boot the host."""
        self._unshare = subprocess.Popen(self._boot, stdin=subprocess.DEVNULL)
        parent = psutil.Process(self._unshare.pid)
        wait_until(
            lambda: [child for child in parent.children() if child.children()], f"{self.name} to boot", timeout=10
        )
        self._first = parent.children()[0].pid

    def stop(self) -> None:
        """Kill all processes of the host at once, as a power failure does."""
        if self._unshare is not None:
            self._unshare.kill()
            self._unshare.wait()
            self._unshare = None

    def popen(self, command: Sequence[object], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on the host."""
        entering = ["nsenter", "--target", str(self._first), "--mount", "--uts", "--pid", "--net", f"--wd={ROOT}"]
        return subprocess.Popen([*entering, *map(str, command)], stdin=subprocess.DEVNULL, **options)

    def run(self, command: Sequence[object], expect: int | None = 0, timeout: float = 60, **options: Any) -> str:
        """Run a command on the host, and return its output; `expect` is the exit code, None for any."""
        process = self.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        output, _ = process.communicate(timeout=timeout)
        assert expect is None or process.returncode == expect, output
        return output


class Network:
    """Hosts that are connected to one switch, and to nothing else."""

    _numbers = itertools.count()

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._prefix = f"maskmoe-{os.getpid()}-{next(self._numbers)}"
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
        hosts_file = folder / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        hosts_file.write_text("\n".join(lines) + "\n")
        self._ip(f"netns add {self._prefix}-switch")
        self._ip(f"-n {self._prefix}-switch link add switch type bridge")
        self._ip(f"-n {self._prefix}-switch link set switch up")
        self.hosts = {}
        for name, address in addresses.items():
            namespace = f"{self._prefix}-{name}"
            self._ip(f"netns add {namespace}")
            self._ip(f"-n {namespace} link add eth0 type veth peer name {name} netns {self._prefix}-switch")
            self._ip(f"-n {namespace} addr add {address}/24 dev eth0")
            self._ip(f"-n {namespace} link set eth0 up")
            self._ip(f"-n {self._prefix}-switch link set {name} master switch up")
            self.hosts[name] = Host(name, address, namespace, hosts_file)
            self.hosts[name].start()

    @staticmethod
    def _ip(arguments: str) -> None:
        subprocess.run(["ip", *arguments.split()], check=True)

    def cut(self, name: str) -> None:
        """Take down a host's link at the switch. The host itself does not notice."""
        self._ip(f"-n {self._prefix}-switch link set {name} down")

    def mend(self, name: str) -> None:
        """Bring up a host's link again."""
        self._ip(f"-n {self._prefix}-switch link set {name} up")

    def remove(self) -> None:
        """Stop all hosts and remove the network."""
        for host in self.hosts.values():
            host.stop()
        for name in (*self.hosts, "switch"):
            self._ip(f"netns delete {self._prefix}-{name}")


@contextmanager
def running_network(names: Sequence[str], folder: Path) -> Iterator[Network]:
    """Make hosts, and remove them at the end.

    Args:
        names: the names of the hosts.
        folder: an existing folder for the hosts' files.
    """
    # On SIGTERM, pytest then tears down all fixtures, as after Ctrl-C, also during the tests that use the hosts.
    HANDLERS[signal.SIGTERM] = signal.default_int_handler
    install_handlers()
    network = Network(names, folder)
    try:
        yield network
    finally:
        network.remove()
