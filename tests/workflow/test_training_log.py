"""Losses and speed in the log that training prints."""

import pytest
from support.training_lines import iteration_line, validation_line

from maskmoe.workflow.training_log import IterationRecord, TrainingHistory, ValidationRecord, parse_line

LINE = iteration_line(10, "7.462409E+00")


def test_iteration_line_is_parsed():
    assert parse_line(LINE) == IterationRecord(iteration=10, total=20, seconds=1.25, batch=16, loss=7.462409)


def test_iteration_line_with_throughput_and_other_losses_is_parsed():
    line = LINE.replace("| learning", "| throughput per GPU (TFLOP/s/GPU): 12.3 | learning").replace(
        "lm loss", "mtp_1 loss: 9.1E+00 | lm loss"
    )
    assert parse_line(line) == parse_line(LINE)


def test_lines_of_a_launched_rank_are_parsed():
    """launch/pretrain.sh puts the rank in front of each line."""
    assert parse_line(f"[rank3]: {LINE}") == parse_line(LINE)
    assert parse_line(f"[rank0]: {validation_line(10)}") == parse_line(validation_line(10))


@pytest.mark.parametrize("loss", [None, "NAN", "INF"])
def test_loss_that_is_not_a_number_is_none(loss):
    assert parse_line(iteration_line(10, loss)).loss is None


@pytest.mark.parametrize("place", ["", " on validation set"])
def test_validation_line_is_parsed(place):
    assert parse_line(validation_line(10, place=place)) == ValidationRecord(10, 6.663481)


def test_loss_of_the_test_set_is_not_that_of_the_validation_set():
    lines = [validation_line(10, place=" on validation set"), validation_line(10, place=" on test set")]
    assert parse_line(lines[1]) is None
    assert TrainingHistory(lines).validations == {10: parse_line(lines[0])}


@pytest.mark.parametrize("line", ["", "Evaluating iter 1/4", "(min, max) time across ranks (ms):", "iteration 3/4"])
def test_other_lines_are_ignored(line):
    assert parse_line(line) is None


def test_repeated_iteration_replaces_the_earlier_record():
    lines = [iteration_line(1, "9.0"), iteration_line(5, "7.0"), validation_line(10), iteration_line(5, "6.0")]
    history = TrainingHistory(lines)
    assert {iteration: record.loss for iteration, record in history.iterations.items()} == {1: 9.0, 5: 6.0}
    assert history.validations[10].loss == 6.663481


def test_training_time_counts_every_iteration_once():
    lines = [iteration_line(4), iteration_line(8), iteration_line(8), iteration_line(10)]
    assert TrainingHistory(lines).training_seconds == pytest.approx(10 * 1.25)
    assert TrainingHistory().training_seconds == 0
