"""launch/slurm/ on a real cluster of two nodes."""

import pytest

pytestmark = pytest.mark.slurm


def test_two_nodes_train_one_model(cluster, new_laptop_run, undisturbed):
    run = new_laptop_run()
    job = cluster.submit("--nodes=2", "--run-dir", run.folder, "--", *run.arguments)
    assert job.wait_for("COMPLETED", "FAILED") == "COMPLETED"
    assert run.losses == undisturbed.losses
