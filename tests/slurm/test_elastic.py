"""`launch/pretrain.sh --nodes MIN:MAX` on two hosts that are connected only by a network."""

import re
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from support.datasets import build_mask, count_ids
from support.network import running_network
from support.paths import ROOT
from support.runs import LAPTOP_VOCAB_SIZE
from support.waiting import wait_until

from maskmoe.files.run_folder import Kind, read_journal
from maskmoe.routing_mask.dispatch_kind import DispatchKind

pytestmark = pytest.mark.slurm

LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
LAYOUTS = """
layouts:
  1: {}
  2: {expert-model-parallel-size: 2}
  4: {expert-model-parallel-size: 4}
"""
# A node of two ranks is noticed to be lost, the layout checked, and the ranks started, within this time in seconds.
RESUME_SECONDS = 120
# Sums over two ranks and over four ranks are rounded differently. Training amplifies the difference from 5e-7 to 2e-3
# in 20 steps with a learning rate of 4e-3, for losses between 4 and 8.
TOLERANCE = 1e-2
LOCAL_RANKS = 4  # on which a mask is rank-local
# Slurm starts a requeued job after half a minute. Smaller steps keep the differences small in a longer run.
LONGER = "--train-iters 400 --lr 2e-4 --min-lr 2e-5"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a model file with layouts for one and for two nodes."""
    path = tmp_path_factory.mktemp("model") / "laptop.yaml"
    path.write_text(LAPTOP.read_text() + LAYOUTS)
    return path


def with_layouts(run, model: Path):
    """Return a run of the model file with layouts, instead of the laptop model on two ranks."""
    words = [word for word in run.arguments if word != str(LAPTOP)]
    at = words.index("--expert-model-parallel-size")
    del words[at : at + 2]
    # With two samples in a micro-batch, four ranks share the global batch of eight. The load-balancing loss is that of
    # a micro-batch, so its size must stay.
    return replace(run, arguments=(str(model), *words, "--micro-batch-size", "2", "--keep-last-checkpoints", "false"))


def train_here(run, ranks: int, *flags: str) -> dict[int, float]:
    """Train by hand on this machine, without an elastic launcher; return the losses."""
    command = [
        ROOT / "launch" / "pretrain.sh",
        "--gpus-per-node",
        ranks,
        "--run-dir",
        run.folder,
        *run.arguments,
        *flags,
    ]
    subprocess.run(list(map(str, command)), check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
    return run.losses


@pytest.fixture(scope="module")
def new_run(new_laptop_run, model):
    """Return a function that describes a new run of the model file with layouts.

    Its argument is the number of ranks on which its mask is rank-local; by default the mask is not rank-local.
    """

    def new_run(local_ranks: int | None = None):
        run = with_layouts(new_laptop_run(), model)
        if local_ranks is None:
            return run
        words = list(run.arguments)
        frequency = count_ids(Path(words[words.index("--data-path") + 1]), LAPTOP_VOCAB_SIZE)
        visible = {"frequent_visible_experts": 8 // local_ranks, "expert_model_parallel_size": local_ranks}
        mask = run.folder.parent / f"rank-local-{local_ranks}.safetensors"
        build_mask(frequency, 8, 4, "rank-local", **visible).save(mask)
        return replace(run, arguments=(*words, "--routing-mask", str(mask)))

    return new_run


@pytest.fixture(scope="module")
def undisturbed(new_run):
    """Return a function that returns the losses of a run that kept its four ranks; takes the argument of `new_run`."""
    return cache(lambda local_ranks=None: train_here(new_run(local_ranks), 4))


@pytest.fixture(scope="module")
def undisturbed_on_two_ranks(new_laptop_run, model):
    """Return the losses of a longer run that kept its two ranks."""
    return train_here(with_layouts(new_laptop_run(LONGER), model), 2)


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory):
    """Return the network of two hosts that are no nodes of the cluster, whose daemons must not be lost."""
    with running_network(("n1", "n2"), tmp_path_factory.mktemp("hosts")) as network:
        yield network


class Node:
    """The launcher of an elastic run on one host."""

    def __init__(self, host, run, *options: str) -> None:
        command = ["launch/pretrain.sh", "--nodes", "1:2", "--gpus-per-node", "2", "--run-dir", run.folder]
        self._log = run.folder.with_suffix(f".{host.name}.log")
        with open(self._log, "a") as log:
            self.process = host.popen([*command, *options, *run.arguments], stdout=log, stderr=log)

    @property
    def output(self) -> str:
        """Everything that the launchers on this host have printed for the run."""
        return self._log.read_text()


@pytest.fixture
def start(two_hosts):
    """Start the launcher of a run on a host; the processes are killed at the end of the test."""
    nodes = []

    def start(name, run, *options):
        nodes.append(Node(two_hosts.hosts[name], run, *options))
        return nodes[-1]

    yield start
    for node in nodes:
        node.process.kill()
        node.process.wait()


def wait_for(node: Node, pattern: str, timeout: float = RESUME_SECONDS) -> re.Match:
    """Wait until the node prints a pattern."""
    deadline = time.monotonic() + timeout
    while not (match := re.search(pattern, node.output, re.DOTALL)):
        assert node.process.poll() is None, node.output[-6000:]
        assert time.monotonic() < deadline, f"{pattern} is not in:\n{node.output[-6000:]}"
        time.sleep(0.2)
    return match


def wait_for_nodes_text(run, pattern: str, timeout: float = 240) -> None:
    """Wait until the journal reports nodes as a pattern says."""

    def texts() -> str:
        return "; ".join(entry.text for entry in read_journal(run.folder) if entry.kind is Kind.NODES)

    wait_until(lambda: re.search(pattern, texts()), pattern, timeout=timeout, report=texts)


def assert_equal(losses, undisturbed) -> None:
    """Check that a run has all losses of another one, up to the order of sums."""
    assert losses.keys() == undisturbed.keys()
    worst = max(abs(losses[iteration] - undisturbed[iteration]) for iteration in losses)
    assert worst < TOLERANCE, worst


@pytest.mark.parametrize("lost", ["n2", "n1"])
def test_lost_host_and_its_return(two_hosts, start, new_run, undisturbed, lost):
    """One host loses its power. The other host trains on alone, and takes the first one in when it is back.

    The mask is rank-local on four ranks, and so on two ranks, too.
    """
    stays = {"n1": "n2", "n2": "n1"}[lost]
    run = new_run(LOCAL_RANKS)
    first = start("n1", run)
    time.sleep(1)  # the older launcher leads
    nodes = {"n1": first, "n2": start("n2", run)}
    run.wait_for_iteration(45)
    two_hosts.hosts[lost].stop()
    begin = time.monotonic()
    wait_for(nodes[stays], rf"{lost} left the run, or gave no sign .*training on 1 node .*iteration +4[1-9]/")
    took = time.monotonic() - begin
    print(f"{lost}: lost, and training again after {took:.1f} s")
    assert took < RESUME_SECONDS

    two_hosts.hosts[lost].start()
    back = start(lost, run)
    wait_for(nodes[stays], rf"{lost} has come, and is taken in at the next checkpoint.*training on 2 nodes")
    assert nodes[stays].process.wait(240) == 0, nodes[stays].output[-6000:]
    assert back.process.wait(60) == 0, back.output[-6000:]
    # The first rank, which describes the layout, may be on either host.
    output = nodes["n1"].output + nodes["n2"].output
    dispatched = re.findall(r"layout +(\d) ranks.*?dispatch +([^\n]*)", output, re.DOTALL)
    assert sorted(dispatched) == [(ranks, DispatchKind.PLANNED.value) for ranks in ("2", "4", "4")]
    assert_equal(run.losses, undisturbed(LOCAL_RANKS))
    # While one host was lost, the losses are those of a usual run on two ranks from the same checkpoint.
    alone = new_run(LOCAL_RANKS)
    assert train_here(alone, 2, "--load", run.folder / "checkpoints", "--ckpt-step", "40", "--exit-interval", "60") == {
        iteration: run.losses[iteration] for iteration in range(41, 61)
    }
    texts = [entry.text for entry in read_journal(run.folder) if entry.kind is Kind.NODES]
    assert len(texts) == 5, texts
    saved = re.findall(r"resumes from \S*iter_(\d+)", nodes[stays].output)
    assert all(int(iteration) % 20 == 0 for iteration in saved)


@pytest.mark.timeout(1800)
def test_slurm_requeues_a_lost_node_alone(cluster, new_laptop_run, model, undisturbed_on_two_ranks):
    """Each node is a job of its own. The other job trains on while Slurm waits for the lost node."""
    run = with_layouts(new_laptop_run(LONGER), model)
    cluster.submit("--nodes=1:2", "--ntasks=1", "--cpus-per-task=2", "--run-dir", run.folder, "--", *run.arguments)
    run.wait_for_iteration(45)
    cluster.fail_node("n2")
    wait_for_nodes_text(run, r"n2 left the run, .*; training on 1 node \(n1\), 1 rank")
    cluster.mend_node("n2")
    wait_for_nodes_text(run, r"n2 has come, .*; training on 2 nodes")
    cluster.wait_for_queue(timeout=900)
    assert len(list((run.folder / "slurm").glob("*.finished"))) == 1
    assert_equal(run.losses, undisturbed_on_two_ranks)
