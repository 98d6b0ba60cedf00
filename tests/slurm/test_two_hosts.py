"""launch/pretrain.sh on two hosts that are connected only by a network."""

import re
import subprocess
import time

import pytest

from maskmoe.processes.interruption import EXIT_REQUEUE

pytestmark = pytest.mark.slurm

HANG_TIMEOUT = 15  # seconds until a rank reports that other ranks are lost
# Seconds until both launchers have exited; a launcher waits a minute for a torchrun that does not answer.
EXIT_TIMEOUT = HANG_TIMEOUT + 120


@pytest.fixture
def start(network):
    """Start a run on both hosts; the processes are killed at the end of the test."""
    processes = []

    def start(run, *options):
        rendezvous = f"{network.hosts['n1'].address}:29500"
        started = []
        for rank, host in enumerate((network.hosts["n1"], network.hosts["n2"])):
            command = ["launch/pretrain.sh", "--nodes", "2", "--node-rank", rank, "--gpus-per-node", "1"]
            command += ["--rendezvous", rendezvous, "--run-dir", run.folder, *options, *run.arguments]
            started.append(host.popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        processes.extend(started)
        return started

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_cut_link(network, start, new_laptop_run, undisturbed):
    """Both launchers report the failure and exit in time. The resumed run reaches the same losses."""
    run = new_laptop_run(f"--hang-timeout {HANG_TIMEOUT} --distributed-timeout-minutes 1")
    processes = start(run, "--max-restarts", "0", "--shutdown-timeout", "10")
    run.wait_for_iteration(32)
    network.cut("n2")
    try:
        begin = time.monotonic()
        outputs = [process.communicate(timeout=EXIT_TIMEOUT)[0] for process in processes]
        took = time.monotonic() - begin
    finally:
        network.mend("n2")
    assert all(process.returncode not in (0, 2, EXIT_REQUEUE) for process in processes), "\n".join(outputs)[-6000:]
    assert took < EXIT_TIMEOUT
    first, second = outputs
    assert re.search(r"rank 1 \(host n2.*\) shows no sign of life", first), first[-4000:]
    assert "the store of the ranks was silent" in second, second[-4000:]
    assert run.saved == 20

    again = start(run)
    outputs = [process.communicate(timeout=240)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], "\n".join(outputs)[-6000:]
    losses = run.losses
    assert set(losses) >= set(range(21, 101))
    assert losses == {iteration: undisturbed.losses[iteration] for iteration in losses}
