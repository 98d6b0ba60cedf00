"""The curves of a run: repeated iterations, many iterations, and values that are not finite."""

import math

import numpy as np
import pytest
from support.training_lines import iteration_line, validation_line
from torch.utils.tensorboard import SummaryWriter

from maskmoe.run_report.events import CLOCK_TIME, EventHistory
from maskmoe.run_report.history import History, Series
from maskmoe.run_report.logs import log_files, read_logs
from maskmoe.run_report.progress import Progress, tokens_per_second


def test_few_values_are_kept_as_they_are():
    series = Series()
    for step in range(1, 11):
        series.append(2 * step, step / 4)
    curve = series.curve()
    assert curve.steps.tolist() == list(range(2, 22, 2))
    assert curve.means.tolist() == curve.lows.tolist() == curve.highs.tolist() == [step / 4 for step in range(1, 11)]
    assert [curve.value_at(step) for step in (1, 2, 3, 20, 21)] == [None, 0.25, 0.5, 2.5, None]


def test_many_values_become_means_of_neighbours():
    values = np.random.default_rng(0).normal(size=10_000)
    series = Series()
    for step, value in enumerate(values, start=1):
        series.append(step, value)
    curve = series.curve()
    assert 512 <= len(curve) <= 1024
    assert curve.steps[-1] == 10_000
    starts = [0, *curve.steps[:-1]]
    for start, end, mean, low, high in zip(starts, curve.steps, curve.means, curve.lows, curve.highs, strict=True):
        part = values[start:end]
        assert (mean, low, high) == (pytest.approx(part.mean()), part.min(), part.max())


def test_values_that_are_not_finite_are_counted_and_left_out():
    series = Series()
    for step, value in enumerate([1.0, math.nan, math.inf, 2.0]):
        series.append(step, value)
    assert series.num_not_finite == 2
    assert series.curve().steps.tolist() == [0, 3]


def test_resumed_run_replaces_what_it_abandoned():
    history = History()
    history.start(1)
    for step in range(1, 10):
        history.append("lm loss", step, 1.0)
    history.append("lm loss validation", 5, 1.0)
    history.append("lm loss validation", 9, 1.0)
    history.start(8)
    history.append("lm loss", 8, 2.0)
    curves = history.curves()
    assert curves["lm loss"].steps.tolist() == list(range(1, 9))
    assert curves["lm loss"].means.tolist() == [1.0] * 7 + [2.0]
    assert curves["lm loss validation"].steps.tolist() == [5]
    assert history.num_starts == 2


def test_values_that_are_not_finite_are_forgotten_if_they_are_repeated():
    history = History()
    history.start(1)
    for step in range(1, 10):
        history.append("lm loss", step, math.nan if step in (3, 7, 8, 9) else 1.0)
    history.start(8)
    assert history.series["lm loss"].num_not_finite == 2
    history.append("lm loss", 8, 1.0)
    history.append("lm loss", 9, math.inf)
    history.append("lm loss", 9, math.inf)
    assert history.series["lm loss"].num_not_finite == 3


def test_many_values_that_are_not_finite_need_little_memory():
    series = Series()
    for step in range(10, 50_001, 10):
        series.append(step, math.nan)
    assert series.num_not_finite == 5000
    assert len(series._not_finite) <= 1024
    for step, expected in ((40_001, 4000), (20_010, 2000), (10, 0)):
        series.remove_from(step)
        assert series.num_not_finite == pytest.approx(expected, abs=1)


def test_clock_that_is_set_back_gives_no_time_of_an_iteration(tmp_path):
    """Neither the time that is left nor the speed may follow from a negative time."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_text("train_iters", "20", 0)
        writer.add_text("seq_length", "32", 0)
        for step in range(1, 11):
            seconds = 10_000 + 2 * step - (3600 if step > 5 else 0)
            writer.add_scalar("lm loss", 1.0, step, walltime=seconds)
            writer.add_scalar("batch-size", 16, step, walltime=seconds)
    history = EventHistory(tmp_path).update()
    curves = history.curves()
    assert curves[CLOCK_TIME].steps.tolist() == [2, 3, 4, 5, 7, 8, 9, 10]
    assert Progress.of(history, curves).seconds_left == pytest.approx(20)
    assert tokens_per_second(curves, 32).means.max() == pytest.approx(16 * 32 / 2)


def test_loss_of_the_test_set_does_not_replace_that_of_the_validation_set(tmp_path):
    """Megatron writes both by the same tag, for the same iteration. A later start may repeat the iteration."""
    tag = "lm loss validation"
    for number, losses in enumerate([[(2, 3.0), (4, 2.5), (4, 2.7)], [(4, 2.4), (4, 2.6)]]):
        with SummaryWriter(tmp_path / "new") as writer:
            for step, loss in losses:
                writer.add_scalar(tag, loss, step)
        # The names of event files begin with the time in seconds, in which their order is that of the starts.
        (new,) = (tmp_path / "new").iterdir()
        new.rename(tmp_path / f"events.out.tfevents.{number}")
        history = EventHistory(tmp_path).update()
        assert history.series[tag].newest == pytest.approx(losses[-2])


def test_logs_are_read_where_there_are_no_events(tmp_path):
    (tmp_path / "logs" / "node0").mkdir(parents=True)
    (tmp_path / "logs" / "node0" / "stdout.log").write_text(
        "\n".join([f"[rank1]: {iteration_line(1)}", iteration_line(2, "nan"), validation_line(2), iteration_line(3)])
    )
    history = read_logs(log_files(tmp_path))
    curves = history.curves()
    assert curves["lm loss"].steps.tolist() == [1, 3]
    assert curves["lm loss validation"].means.tolist() == [6.663481]
    assert curves["iteration-time"].means.tolist() == [1.25] * 3
    assert curves["batch-size"].means.tolist() == [16] * 3
    assert curves["grad-norm"].means.tolist() == [6.295] * 3
    assert curves["learning-rate"].means.tolist() == [1.66974e-3] * 3
    assert history.texts["train_iters"] == "20"
