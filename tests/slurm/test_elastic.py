"""`launch/slurm/submit.sh --nodes=MIN:MAX` on a cluster of two nodes."""

import re
import subprocess
from dataclasses import replace

import pytest
from support.paths import ROOT
from support.system import wait_until

from maskmoe.files.run_folder import Kind, read_journal

pytestmark = pytest.mark.slurm

LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
LAYOUTS = """
layouts:
  1: {}
  2: {expert-model-parallel-size: 2}
"""
# The loss of a node is noticed, the layout checked, and the remaining ranks started, within this time in seconds.
RESUME_SECONDS = 120
# Sums over one rank and over two ranks are rounded differently, and training amplifies the difference.
TOLERANCE = 1e-2
# Slurm starts a requeued job after half a minute. Smaller steps keep the differences small in a longer run.
LONGER = "--train-iters 400 --lr 2e-4 --min-lr 2e-5"


@pytest.fixture(scope="module")
def new_run(new_laptop_run, tmp_path_factory):
    """Return a function that describes a new, longer run of a model file with layouts for one and for two nodes."""
    model = tmp_path_factory.mktemp("model") / "laptop.yaml"
    model.write_text(LAPTOP.read_text() + LAYOUTS)

    def new_run():
        run = new_laptop_run(LONGER)
        words = [word for word in run.arguments if word != str(LAPTOP)]
        at = words.index("--expert-model-parallel-size")
        del words[at : at + 2]
        return replace(run, arguments=(str(model), *words))

    return new_run


@pytest.fixture(scope="module")
def undisturbed_losses(new_run) -> dict[int, float]:
    """Return the losses of a run that kept its two ranks, which were started by hand on this machine."""
    run = new_run()
    command = [ROOT / "launch" / "pretrain.sh", "--gpus-per-node", "2", "--run-dir", run.folder, *run.arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=900)
    return run.losses


def wait_for_nodes_text(run, pattern: str, timeout: float = 240) -> None:
    """Wait until the journal reports nodes as a pattern says."""

    def texts() -> str:
        return "; ".join(entry.text for entry in read_journal(run.folder) if entry.kind is Kind.NODES)

    wait_until(lambda: re.search(pattern, texts()), pattern, timeout=timeout, report=texts)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("lost", "stays"), [("n2", "n1"), ("n1", "n2")])
def test_slurm_requeues_a_lost_node_alone(cluster, new_run, undisturbed_losses, lost, stays):
    """Each node is a job of its own. The other job trains on while Slurm waits for the lost node."""
    run = new_run()
    cluster.submit("--nodes=1:2", "--ntasks=1", "--cpus-per-task=2", "--run-dir", run.folder, "--", *run.arguments)
    run.wait_for_iteration(45)
    cluster.fail_node(lost)
    wait_for_nodes_text(
        run, rf"{lost} left the run, .*; training on 1 node \({stays}\), 1 rank", timeout=RESUME_SECONDS
    )
    cluster.mend_node(lost)
    wait_for_nodes_text(run, rf"{lost} has come, .*; training on 2 nodes")
    cluster.wait_for_queue(timeout=900)
    assert len(list((run.folder / "slurm").glob("*.finished"))) == 1
    assert run.losses == pytest.approx(undisturbed_losses, rel=0, abs=TOLERANCE)
