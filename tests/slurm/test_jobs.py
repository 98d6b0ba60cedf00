"""launch/slurm/ on a real Slurm cluster of two nodes."""

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slurm

LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"


@pytest.fixture
def submit(cluster):
    """Submit a job of two nodes that trains a run; it is cancelled at the end of the test."""
    jobs = []

    def submit(run, *options):
        cluster.wait_for_nodes()
        jobs.append(cluster.submit("--nodes=2", *options, "--run-dir", run.folder, "--", *run.arguments))
        return jobs[-1]

    yield submit
    for job in jobs:
        cluster.run("scancel", "--signal=KILL", job.number, expect=None)
        cluster.run("scancel", job.number, expect=None)


def log_of(run, job) -> str:
    return (run.folder / "slurm" / f"{job.number}.log").read_text()


def assert_completed(job, run):
    assert job.wait_for("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") == "COMPLETED", log_of(run, job)


def log_of_second_attempt(run, job) -> str:
    return (run.folder / "slurm" / job.number / "attempt1.n1.log").read_text()


def test_preemption(cluster, submit, new_laptop_run, undisturbed):
    """A job of another partition takes the nodes, and Slurm sends the signal.

    Slurm requeues the preempted job once more after it has ended. The requeued job then finds nothing to do.
    """
    run = new_laptop_run()
    job = submit(run)
    run.wait_for_iteration(12)
    cluster.run("srun", "--partition=high", "--nodes=2", "--exclusive", "true")
    assert 12 <= run.saved < 100
    cluster.wait_for_queue()
    assert_completed(job, run)
    assert run.losses == undisturbed.losses
    assert log_of(run, job).count("the job is requeued") == 1


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_dead_node(cluster, submit, new_laptop_run, undisturbed, node):
    """The node dies, with or without the job's script on it. Lost iterations are trained again to the same losses."""
    run = new_laptop_run()
    job = submit(run)
    run.wait_for_iteration(32)
    cluster.fail_node(node)
    job.wait_for("PENDING")
    assert run.saved == 20
    cluster.mend_node(node)
    assert_completed(job, run)
    assert job.show("Restarts") == "1"
    assert "at iteration 20" in log_of_second_attempt(run, job)
    losses = run.losses
    assert set(losses) >= set(range(21, 101))
    assert losses == {iteration: undisturbed.losses[iteration] for iteration in losses}


def test_job_goes_on_with_the_nodes_that_it_gets(cluster, new_laptop_run, tmp_path):
    """The first node, with the rendezvous and the job's script, is lost for good."""
    run = new_laptop_run()
    at = run.arguments.index("--expert-model-parallel-size")
    flags = (*run.arguments[1:at], *run.arguments[at + 2 :])
    model = tmp_path / "laptop.yaml"
    model.write_text(f"{LAPTOP.read_text()}layouts:\n  1: {{}}\n  2: {{expert-model-parallel-size: 2}}\n")
    cluster.wait_for_nodes()
    job = cluster.submit("--nodes=1-2", "--exclusive", "--run-dir", run.folder, "--", model, *flags)
    run.wait_for_iteration(32)
    saved = run.saved
    cluster.fail_node("n1")
    try:
        assert_completed(job, run)
    finally:
        cluster.mend_node("n1")
    log = (run.folder / "slurm" / job.number / "attempt1.n2.log").read_text()
    assert "layout      1 rank" in log
    assert f"iter_{saved:07d}" in log
    assert list(run.losses)[-1] == 100


def test_unfit_node_is_left_out(cluster, submit, new_laptop_run):
    """The node's /dev/shm is full. A job with a spare node trains without it; a job that needs both nodes fails."""
    cluster.nodes["n1"].run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"])
    try:
        run = new_laptop_run("--expert-model-parallel-size 1 --train-iters 2")
        job = submit(run, "--train-nodes", "1")
        assert_completed(job, run)
        too_few = new_laptop_run()
        failing = submit(too_few)
        assert failing.wait_for("FAILED", "COMPLETED") == "FAILED"
    finally:
        cluster.nodes["n1"].run(["umount", "/dev/shm"])
    assert "node n1: /dev/shm has" in log_of(run, job)
    assert [log.name for log in (run.folder / "slurm" / job.number).iterdir()] == ["attempt0.n2.log"]
    assert "1 nodes pass the check (see above), 2 are needed" in log_of(too_few, failing)
