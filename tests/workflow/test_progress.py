"""The progress of a stage on one line."""

import io

import pytest
from support.training_lines import iteration_line, validation_line

from maskmoe.workflow.progress import ProgressLine, StageProgress, format_seconds


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    return StageProgress("[5/8] train", seq_length=100, clock=clock)


def test_stage_without_training_shows_its_duration(progress, clock):
    clock.now += 7
    assert str(progress) == "[5/8] train 0:07"
    assert progress.seconds == 7


def test_training_shows_share_iteration_loss_speed_and_remaining_time(progress, clock):
    progress.read(iteration_line(1))
    assert "ETA ?" in str(progress)
    clock.now += 90
    progress.read(iteration_line(10, "4.5"))
    progress.read(validation_line(10))
    title, *parts = str(progress).split(" · ")
    assert title.startswith("[5/8] train 50% ")
    assert title.endswith(" 10/20")
    assert parts == ["loss 4.50", "1,280 tokens/s", "ETA 1:40", "valid 6.66"]
    clock.now += 30
    assert "ETA 1:10" in str(progress)


def test_resumed_training_estimates_by_the_iterations_since_the_start(progress, clock):
    progress.read(iteration_line(10))
    clock.now += 20
    progress.read(iteration_line(12))
    assert "ETA 1:20" in str(progress)


@pytest.mark.parametrize("iteration", [2, 4])
def test_training_that_goes_back_estimates_by_the_iterations_since_then(progress, clock, iteration):
    """Ranks that start again repeat iterations: the first one that was logged, or earlier ones."""
    progress.read(iteration_line(4))
    clock.now += 50
    progress.read(iteration_line(iteration))
    assert "ETA ?" in str(progress)
    clock.now += 20
    progress.read(iteration_line(iteration + 2))
    assert f"ETA {format_seconds(10 * (20 - iteration - 2))}" in str(progress)


def test_loss_that_is_not_a_number_is_shown(progress):
    progress.read(iteration_line(10, "NAN"))
    assert "loss is not a number" in str(progress)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (67, "1:07"), (3599.7, "1:00:00"), (3723, "1:02:03")])
def test_seconds_are_formatted(seconds, text):
    assert format_seconds(seconds) == text


def test_file_gets_a_line_from_time_to_time(clock):
    stream = io.StringIO()
    line = ProgressLine(stream, interval=10, clock=clock)
    for second in range(25):
        clock.now = 100.0 + second
        line.update(f"at {second}")
    line.print("done")
    assert stream.getvalue() == "at 10\nat 20\ndone\n"


@pytest.fixture
def terminal(monkeypatch):
    """A stream of a terminal with 20 columns."""
    monkeypatch.setenv("COLUMNS", "20")
    stream = io.StringIO()
    stream.isatty = lambda: True
    return stream


def shown_lines(stream):
    """The lines of a terminal: a carriage return lets later characters replace earlier ones."""
    lines = []
    for line in stream.getvalue().split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines


def test_terminal_line_is_rewritten_and_never_wraps(terminal):
    line = ProgressLine(terminal)
    line.update("a" * 50)
    assert shown_lines(terminal) == ["a" * 19]
    line.update("train 1/2 · loss 3 · 9 tokens/s")
    assert shown_lines(terminal) == ["train 1/2 · loss 3"]
    line.print("done")
    line.update("next")
    assert shown_lines(terminal) == ["done", "next"]
    line.clear()
    assert shown_lines(terminal) == ["done", ""]
