"""A run folder with everything that the status shows."""

import pytest
from support.runs import write_arguments, write_checkpoint, write_events


@pytest.fixture
def run(tmp_path):
    """A run that has trained 20 of 40 iterations."""
    folder = tmp_path / "my run"
    write_events(folder / "tensorboard")
    write_arguments(folder)
    for iteration in (10, 20):
        write_checkpoint(folder / "checkpoints", iteration)
    return folder
