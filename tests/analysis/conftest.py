"""Fixtures: a folder with data, and the checkpoints of a short training run in this folder."""

from pathlib import Path

import pytest
from support.datasets import write_inputs
from support.launchers import run_program
from support.small_series import NUM_EXPERTS, TRAINING, VOCAB_SIZE


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokenizer, a dataset, token counts and a routing mask."""
    folder = tmp_path_factory.mktemp("routing")
    write_inputs(folder, VOCAB_SIZE, NUM_EXPERTS, num_layers=3)
    return folder


@pytest.fixture(scope="session")
def checkpoints(workplace: Path) -> Path:
    """The folder with the checkpoints of a training run, at `ITERATIONS`."""
    run_program(f"-m maskmoe.training.pretrain {TRAINING}", workplace)
    return workplace / "checkpoints"
