"""launch/check_node.sh: the problems that it finds on a node."""

import os
import socket
import subprocess
import time

import pytest
from support.paths import ROOT
from support.system import write_script

SCRIPT = ROOT / "launch" / "check_node.sh"


@pytest.fixture
def check(tmp_path):
    """Run the script with shell programs as `nvidia-smi` and `dmesg`; return its exit code and its errors."""

    def check(*arguments, nvidia_smi="exit 1", dmesg="exit 1"):
        for name, program in (("nvidia-smi", nvidia_smi), ("dmesg", dmesg)):
            write_script(tmp_path / name, f"#!/bin/sh\n{program}\n")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURMD_NODENAME": "n7"}
        result = subprocess.run(
            [SCRIPT, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=60
        )
        return result.returncode, result.stderr

    return check


def gpus(errors: str = "0", count: int = 2) -> str:
    """Return a shell program like `nvidia-smi`, which shows `count` GPUs, the last one with `errors` memory errors."""
    shown = "; ".join(f"echo 'GPU {gpu}: NVIDIA H100'" for gpu in range(count))
    counts = "; ".join(f"echo '{gpu}, {errors if gpu == count - 1 else 0}'" for gpu in range(count))
    return f"case $1 in --list-gpus) {shown} ;; *ecc*) {counts} ;; esac"


def test_sound_node(check, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        arguments = ("--run-dir", tmp_path / "new", "--time", int(time.time()), "--rendezvous", f"127.0.0.1:{port}")
        assert check(*arguments, "--gpus=2", nvidia_smi=gpus()) == (0, "")
    assert list((tmp_path / "new").iterdir()) == []
    # Before the run, no process listens at the port. The address of IPv6 is in brackets.
    assert check("--rendezvous", f"[::1]:{port}") == (0, "")
    assert check("--rendezvous", f"127.0.0.1:{port}") == (0, "")


def test_clock(check):
    """Slurm may start the check minutes after it was given the time."""
    assert [check("--time", int(time.time()) + seconds)[0] for seconds in (-420, -300, 0, 30, 90)] == [1, 0, 0, 0, 1]


LOST = "[ $1 = --list-gpus ] || { echo 'GPU is lost'; exit 15; }; echo GPU 0; echo GPU 1"
XID = "echo '[1.2] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off'"


@pytest.mark.parametrize(
    ("arguments", "machine", "named"),
    [
        (("--min-shm", 1 << 30), {}, "/dev/shm"),
        (("--run-dir", "/proc/x"), {}, "/proc/x"),
        (("--run-dir", "/tmp", "--min-disk", 1 << 40), {}, "/tmp"),
        (("--time", 1_000_000_000), {}, "clock"),
        (("--rendezvous", "no-such-host.invalid:1"), {}, "no-such-host.invalid"),
        (("--gpus=2",), {"nvidia_smi": gpus(count=1)}, "1 GPUs, expected 2"),
        (("--gpus=2",), {"nvidia_smi": LOST}, "GPU is lost"),
        (("--gpus=2",), {"nvidia_smi": gpus("3")}, "GPU 1: 3"),
        (("--gpus=2",), {"nvidia_smi": gpus(), "dmesg": XID}, "Xid (PCI:0000:3b:00): 79"),
    ],
)
def test_unfit_node(check, arguments, machine, named):
    code, errors = check(*arguments, **machine)
    assert (code, errors.count("\n")) == (1, 1)
    assert errors.startswith("node n7: ")
    assert named in errors


def test_errors_that_do_not_count(check):
    """A GPU may have no error correction, and programs cause Xid 13."""
    xid = "echo '[1.2] NVRM: Xid (PCI:0000:3b:00): 13, Graphics Exception'"
    assert check("--gpus", nvidia_smi=gpus("[N/A]"), dmesg=xid) == (0, "")
