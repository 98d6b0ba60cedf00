"""launch/pretrain.sh on two hosts that are connected only by a network."""

import re
import subprocess
import time
from dataclasses import replace

import pytest
from support.paths import ROOT
from support.system import wait_until

from maskmoe.processes.interruption import EXIT_REQUEUE

pytestmark = pytest.mark.slurm

TIMEOUT = 15  # seconds until a collective that lacks a rank fails
# Seconds until both launchers have exited: a launcher waits a minute for the answer of a lost node.
EXIT_TIMEOUT = TIMEOUT + 90
LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
LAYOUTS = """
layouts:
  1: {}
  2: {expert-model-parallel-size: 2}
"""


class Node:
    """A launcher on one host.

    Attributes:
        process: The process of the launcher.
    """

    def __init__(self, host, number: int, run, *options: object) -> None:
        self._log = run.folder.parent / f"{run.folder.name}-{host.name}-{time.monotonic()}.log"
        command = ["launch/pretrain.sh", "--node-rank", number, "--nproc-per-node", "1"]
        command += ["--run-dir", run.folder, *options, *run.arguments]
        with open(self._log, "w") as log:
            self.process = host.popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self, timeout: float = 240) -> int:
        return self.process.wait(timeout)


@pytest.fixture
def start(network):
    """Start the launcher of one node; the process is killed at the end of the test."""
    nodes = []

    def start(run, number: int, *options: object) -> Node:
        rendezvous = f"{network.hosts['n1'].address}:29500"
        host = network.hosts[("n1", "n2")[number]]
        nodes.append(Node(host, number, run, "--rendezvous", rendezvous, *options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.process.kill()
        node.process.wait()


def test_cut_link(network, start, new_laptop_run):
    """Both launchers report the failure and exit in time."""
    run = new_laptop_run(f"--distributed-timeout-minutes 1 --distributed-timeout-seconds-after-init {TIMEOUT}")
    nodes = [start(run, number, "--nodes", 2, "--max-restarts", 0) for number in (0, 1)]
    run.wait_for_iteration(32)
    network.cut("n2")
    try:
        begin = time.monotonic()
        codes = [node.wait(EXIT_TIMEOUT) for node in nodes]
        assert time.monotonic() - begin < EXIT_TIMEOUT
    finally:
        network.mend("n2")
    assert all(code not in (0, 2, EXIT_REQUEUE) for code in codes), [node.output[-3000:] for node in nodes]
    assert run.saved == 20


@pytest.fixture
def elastic_run(new_laptop_run, tmp_path):
    """A longer run with a layout for one and for two nodes."""
    model = tmp_path / "laptop.yaml"
    model.write_text(LAPTOP.read_text() + LAYOUTS)
    run = new_laptop_run("--train-iters 1000")
    words = [word for word in run.arguments if word != str(LAPTOP)]
    at = words.index("--expert-model-parallel-size")
    del words[at : at + 2]
    return replace(run, arguments=(str(model), *words))


def starts(*nodes: Node) -> list[tuple[int, int]]:
    """Return the starts of a run: the number of ranks, and the iteration that they resumed from, 0 for none."""
    found, ranks = [], 0
    for line in "\n".join(node.output for node in nodes).splitlines():
        if layout := re.search(r"\]: layout +(\d+) rank", line):
            ranks = int(layout[1])
        if start := re.search(r"\]: start +(.*)", line):
            iteration = re.search(r"iter_(\d+)", start[1])
            found.append((ranks, int(iteration[1]) if iteration else 0))
    return sorted(found, key=lambda start: start[1])


def wait_for_starts(number: int, *nodes: Node) -> list[tuple[int, int]]:
    """Wait until a number of starts has been made, and return all."""
    wait_until(
        lambda: len(starts(*nodes)) >= number,
        f"start {number}",
        timeout=180,
        report=lambda: "\n\n".join(node.output[-3000:] for node in nodes),
    )
    return starts(*nodes)


@pytest.mark.timeout(1200)
def test_node_is_lost_and_returns(network, start, elastic_run):
    """One node trains on from the last checkpoint. When the other node is taken in, no step is lost."""
    run, options = elastic_run, ("--nodes", "1:2")
    nodes = [start(run, number, *options) for number in (0, 1)]
    run.wait_for_iteration(45)
    network.hosts["n2"].stop()
    saved = run.saved
    (_, (ranks, iteration)) = wait_for_starts(2, *nodes)
    assert (ranks, iteration) == (1, saved)
    network.hosts["n2"].start()
    nodes.append(start(run, 1, *options))
    (*_, (ranks, iteration)) = wait_for_starts(3, *nodes)
    assert ranks == 2
    saves = [int(number) for number in re.findall(r"stopped: saved iteration (\d+)", nodes[0].output)]
    assert saves == [iteration]
    assert [nodes[0].wait(600), nodes[2].wait(60)] == [0, 0], [node.output[-3000:] for node in nodes]
    assert list(run.losses)[-1] == 1000


@pytest.mark.timeout(1200)
def test_node_of_the_rendezvous_is_lost(network, start, elastic_run):
    """The other node fails in time; Slurm starts such a run again, see test_jobs."""
    run, options = elastic_run, ("--nodes", "1:2")
    _, second = [start(run, number, *options) for number in (0, 1)]
    run.wait_for_iteration(45)
    network.hosts["n1"].stop()
    try:
        assert second.wait(180) == 1, second.output[-3000:]
    finally:
        network.hosts["n1"].start()
