"""Makes a Slurm cluster on hosts of this machine, and laptop runs to train on the cluster."""

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.paths import ROOT
from support.runs import make_laptop_data, read_losses
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


LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
NODES = ("n1", "n2")
ITERATIONS = 100
SAVE_INTERVAL = 20


# ---- Slurm -----------------------------------------------------------------------------------------------------------

# Jobs of the partition `high` preempt jobs of the partition `low`, after a minute's grace. Waits that take minutes
# on real clusters take seconds here. A requeued job waits for `cred_expire` seconds. The wait is longer than the 10
# seconds (MessageTimeout) for which the controller tries to end the processes of a lost node. Otherwise the message
# could reach the returned node late and end the requeued job, which has the same number.
SLURM_CONF = """
ClusterName=maskmoe
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=15
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
SlurmdTimeout=6
KillWait=10
ReturnToService=2
NodeName=DEFAULT CPUs=2 RealMemory=1000 State=UNKNOWN
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=2 MaxTime=60
"""


class Cluster:
    """A Slurm cluster of two nodes, with a controller on a third host.

    Attributes:
        nodes: the hosts of the nodes, by name.
    """

    def __init__(self, network: Network, folder: Path) -> None:
        self.folder = folder
        self._control = network.hosts["control"]
        self.nodes = {name: network.hosts[name] for name in NODES}
        self._environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[Any]] = []

    def start(self) -> None:
        """Start all daemons, and wait until all nodes are idle."""
        (self.folder / "state").mkdir()
        nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address}" for host in self.nodes.values())
        conf = SLURM_CONF.format(control=self._control.address, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self._daemon(self._control, "slurmctld", "-D")
        for name in self.nodes:
            self.start_node(name)
        self.wait_for_nodes()

    def _daemon(self, host: Host, *command: str) -> None:
        with open(self.folder / f"{host.name}.out", "a") as out:
            self._daemons.append(host.popen(command, env=self._environment, stdout=out, stderr=out))

    def start_node(self, name: str) -> None:
        """Start the daemon of a node."""
        self._daemon(self.nodes[name], "slurmd", "-N", name, "-D")

    def wait_for_nodes(self) -> None:
        """Wait until all nodes are idle."""
        states = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t")
        wait_until(lambda: self.run(*states, expect=None).split() == ["idle"] * len(self.nodes), "idle nodes")

    def wait_for_queue(self, timeout: float = 300) -> None:
        """Wait until the queue is empty."""
        wait_until(lambda: not self.run("squeue", "--noheader"), "an empty queue", timeout=timeout)

    def run(self, *command: object, expect: int | None = 0, timeout: float = 60) -> str:
        """Run a command, such as one of Slurm's, on the controller, and return its output."""
        return self._control.run(command, env=self._environment, expect=expect, timeout=timeout)

    def fail_node(self, name: str) -> None:
        """Kill all processes of a node at once, including its daemon, without a message to Slurm."""
        self.nodes[name].stop()

    def mend_node(self, name: str) -> None:
        """Boot a node again."""
        self.nodes[name].start()
        self.start_node(name)

    def submit(self, *arguments: object) -> "Job":
        """Submit a job by launch/slurm/submit.sh."""
        output = self.run(ROOT / "launch" / "slurm" / "submit.sh", "--parsable", *arguments)
        return Job(self, output.strip())

    def stop(self) -> None:
        """Kill all daemons."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()


@dataclass(frozen=True)
class Job:
    """A job in the queue; sbatch has printed the number."""

    cluster: Cluster
    number: str

    def show(self, key: str) -> str:
        """Return the value of a key in `scontrol show job`."""
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{key}="))

    @property
    def state(self) -> str:
        """The job's state."""
        return self.show("JobState")

    def wait_for(self, *states: str, timeout: float = 240) -> str:
        """Wait until the job is in one of the states, and return the state."""
        wait_until(lambda: self.state in states, f"job {self.number} to be {' or '.join(states)}", timeout=timeout)
        return self.state


# ---- Laptop runs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LaptopRun:
    """A short run of the laptop model, with its experts on two ranks.

    Attributes:
        folder: the run folder.
        arguments: the arguments of `launch/pretrain.sh`.
    """

    folder: Path
    arguments: tuple[str, ...]

    @property
    def losses(self) -> dict[int, float]:
        """The losses by iteration, with the precision of fp32; of a repeated iteration, the last loss."""
        return read_losses(self.folder)

    @property
    def saved(self) -> int:
        """The iteration of the newest checkpoint."""
        # pytest may import this file before tests/conftest.py prepares the process, and the module imports Megatron.
        from maskmoe.checkpoint.series import read_tracker

        return read_tracker(self.folder / "checkpoints")

    def wait_for_iteration(self, iteration: int, timeout: float = 180) -> None:
        """Wait until a rank logs an iteration."""
        line = re.compile(rf"iteration +{iteration}/")
        logs = "logs/node*/*/attempt_*/*/stdout.log"
        wait_until(
            lambda: any(line.search(log.read_text()) for log in self.folder.glob(logs)),
            f"iteration {iteration}",
            timeout=timeout,
        )


@pytest.fixture(scope="session")
def new_laptop_run(tmp_path_factory) -> Callable[..., LaptopRun]:
    """Return a function that describes a new laptop run; its argument holds further flags."""
    folder = tmp_path_factory.mktemp("laptop")
    short = f"--train-iters {ITERATIONS} --seq-length 64 --log-interval 1 --tensorboard-log-interval 1 --eval-iters 1"
    flags = f"{make_laptop_data(folder, num_documents=400)} {short} --save-interval {SAVE_INTERVAL}"
    flags += " --expert-model-parallel-size 2"
    count = 0

    def new_laptop_run(more: str = "") -> LaptopRun:
        nonlocal count
        count += 1
        arguments = f"{LAPTOP} {flags} --data-cache-path {folder}/cache {more}"
        return LaptopRun(folder / f"run{count}", tuple(arguments.split()))

    return new_laptop_run


@pytest.fixture(scope="session")
def undisturbed(new_laptop_run) -> LaptopRun:
    """Return a finished run whose ranks both ran on this machine, started by hand."""
    run = new_laptop_run()
    command = [ROOT / "launch" / "pretrain.sh", "--nproc-per-node", "2", "--run-dir", run.folder, *run.arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert len(run.losses) == ITERATIONS
    return run


# ---- Fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def network(tmp_path_factory) -> Iterator[Network]:
    """Return the network of the controller and the nodes."""
    with running_network(("control", *NODES), tmp_path_factory.mktemp("network")) as network:
        yield network


@pytest.fixture(scope="session")
def cluster(network, tmp_path_factory) -> Iterator[Cluster]:
    """Return a running cluster."""
    cluster = Cluster(network, tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
