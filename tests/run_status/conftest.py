"""A run folder with everything that the status shows."""

import time

import pytest
from support.run_folders import write_arguments, write_checkpoint, write_events, write_journal

from maskmoe.files.run_folder import Kind


@pytest.fixture
def run(tmp_path):
    """A run that was restarted once, and then stopped after iteration 20 of 40."""
    folder = tmp_path / "my run"
    write_events(folder / "tensorboard")
    write_arguments(folder)
    for iteration in (10, 20):
        write_checkpoint(folder / "checkpoints", iteration)
    now = time.time()
    write_journal(
        folder,
        (Kind.STARTED, now - 900, "2 ranks train on 1 node", 0, {"ranks": 2}),
        (Kind.WARNED, now - 700, "the loss of iteration 7 is a spike", 7, {}),
        (Kind.NODES, now - 601, "node b was lost", 9, {}),
        (Kind.ENDED, now - 600, "the run failed", 9, {"exit_code": 1}),
        (Kind.STARTED, now - 500, "1 rank trains", 7, {"ranks": 1}),
        (Kind.SAVED, now - 490, "saved", 20, {"seconds": 0.5, "is_local": False}),
        (Kind.ENDED, now - 480, "stopped by SIGTERM", 20, {"exit_code": 75}),
    )
    return folder
