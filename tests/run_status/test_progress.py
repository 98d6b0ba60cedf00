"""How far a run is follows from its scalars, its logs and its journal."""

import math
import os
import time

import pytest
from support.run_folders import write_arguments, write_events
from support.training_lines import iteration_line, validation_line

from maskmoe.run_status.arguments import RunArguments
from maskmoe.run_status.logs import NewestLines, read_newest_lines
from maskmoe.run_status.progress import Progress
from maskmoe.run_status.scalars import Logged, read_events

NO_LINES = NewestLines(None, None, None)


@pytest.fixture
def measure(tmp_path):
    """Return the progress of a run that has logged 20 iterations of 0.25 s."""
    write_events(tmp_path / "tensorboard")
    write_arguments(tmp_path)
    return lambda loss=None: Progress.of(
        read_events(tmp_path / "tensorboard"), read_newest_lines(tmp_path), loss, RunArguments.read(tmp_path)
    )


def test_progress_of_event_files(measure):
    progress = measure()
    assert (progress.iteration, progress.total, progress.loss) == (20, 40, 0.25)
    assert (progress.held_out_iteration, progress.held_out_loss) == (20, pytest.approx(0.3))
    assert progress.seconds_per_iteration == pytest.approx(0.25)
    assert progress.tokens_per_second == pytest.approx(16 * 32 * 4)
    assert progress.seconds_left == pytest.approx(5)


def test_newest_iterations_come_from_the_logs(measure, tmp_path):
    """Event files are written from time to time only."""
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "out.log"
    log.write_text(
        "\n".join([iteration_line(21, "2.5"), f"[rank1]: {iteration_line(22, '2.25')}", validation_line(22)])
    )
    progress = measure()
    assert (progress.iteration, progress.loss, progress.total) == (22, 2.25, 40)
    assert (progress.held_out_iteration, progress.held_out_loss) == (22, 6.663481)
    old = time.time() - 3600
    os.utime(log, (old, old))
    assert measure().iteration == 20


def test_last_loss_is_that_of_the_console(measure):
    """With a log interval above 1, Megatron prints a mean."""
    assert measure(loss=0.5).loss == 0.5
    assert measure(loss="damaged").loss == 0.25


def test_run_with_logs_only(tmp_path):
    (tmp_path / "run.log").write_text("\n".join([iteration_line(1), iteration_line(2, "nan")]))
    progress = Progress.of(Logged(), read_newest_lines(tmp_path), None, RunArguments())
    assert (progress.iteration, progress.total) == (2, 20)
    assert math.isnan(progress.loss)
    assert progress.seconds_left is None


def test_time_between_two_starts_is_not_counted(tmp_path):
    write_events(tmp_path, start=1000)
    write_events(tmp_path, first=21, last=30, start=90_000)
    progress = Progress.of(read_events(tmp_path), NO_LINES, None, RunArguments())
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
