"""How far a run is follows from its scalars, and its last loss from its journal."""

import pytest
from support.run_folders import write_arguments, write_events

from maskmoe.run_status.arguments import RunArguments
from maskmoe.run_status.progress import Progress
from maskmoe.run_status.scalars import read_events


@pytest.fixture
def measure(tmp_path):
    """Return the progress of a run that has logged 20 iterations of 0.25 s."""
    write_events(tmp_path / "tensorboard")
    write_arguments(tmp_path)
    return lambda loss=None: Progress.of(read_events(tmp_path / "tensorboard"), loss, RunArguments.read(tmp_path))


def test_progress_of_event_files(measure):
    progress = measure()
    assert (progress.iteration, progress.total, progress.loss) == (20, 40, 0.25)
    assert (progress.held_out_iteration, progress.held_out_loss) == (20, pytest.approx(0.3))
    assert progress.seconds_per_iteration == pytest.approx(0.25)
    assert progress.tokens_per_second == pytest.approx(16 * 32 * 4)
    assert progress.seconds_left == pytest.approx(5)


def test_last_loss_is_that_of_the_console(measure):
    """With a log interval above 1, Megatron prints a mean."""
    assert measure(loss=0.5).loss == 0.5
    assert measure(loss="damaged").loss == 0.25


def test_time_between_two_starts_is_not_counted(tmp_path):
    write_events(tmp_path, start=1000)
    write_events(tmp_path, first=21, last=30, start=90_000)
    progress = Progress.of(read_events(tmp_path), None, RunArguments())
    assert progress.seconds_per_iteration == pytest.approx(0.25)


def test_arguments_of_a_run(tmp_path):
    assert RunArguments.read(tmp_path) == RunArguments()
    folder = "# Relative paths are relative to /work"
    write_arguments(tmp_path, folder, save="runs/a", tensorboard_dir="/tb", load=None, lr="0.1", layers="9" * 5000)
    arguments = RunArguments.read(tmp_path)
    assert [str(arguments.path(name)) for name in ("save", "tensorboard_dir", "load")] == [
        "/work/runs/a",
        "/tb",
        "None",
    ]
    assert [arguments.number(name) for name in ("train_iters", "lr", "layers", "other")] == [40, None, None, None]
