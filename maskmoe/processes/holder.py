"""Identifies a process for the processes of all hosts, and finds out whether it still runs."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock, or that leads a node of a run.

    Attributes:
        host: name of its host.
        pid: its process id on that host.
        started: when the process started, in seconds since the epoch, which tells it from a later process of this id.
        pid_namespace: the boot of the machine and the namespace in which the process has its id; empty if unknown.
            Hosts may have equal names: pods in the network of their host, or containers with a fixed name.
    """

    host: str
    pid: int
    started: float
    pid_namespace: str = ""

    @classmethod
    def this_process(cls) -> Self:
        """Return the holder that this process would be."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), _pid_namespace())

    @property
    def is_here(self) -> bool:
        """Whether the process ran on this host, so that its id shows whether it still runs.

        A holder without a namespace, in a lock file of an earlier version, counts as a process of another host, whose
        signs of life show whether it runs. On hosts that do not know their own namespace, only the names are compared.
        """
        return (self.host, self.pid_namespace) == (socket.gethostname(), _pid_namespace())

    @property
    def is_alive(self) -> bool:
        """Whether the process still runs on this host."""
        try:
            process = psutil.Process(self.pid)
            return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 1
        except psutil.Error:
            return False

    @property
    def has_ended(self) -> bool:
        """Whether the process ran on this host and has ended; False for a process of another host."""
        return self.is_here and not self.is_alive


def _pid_namespace() -> str:
    """Return what tells the process ids that this process sees from those of other hosts; empty if unknown."""
    try:
        return f"{_BOOT_ID.read_text().strip()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""
