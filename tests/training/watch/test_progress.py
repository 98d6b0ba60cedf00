"""The lines that a run prints about its progress and its end."""

import re
from argparse import Namespace

import pytest
import torch
from support.runs import write_checkpoint

from maskmoe.errors import RunFailure
from maskmoe.processes.interruption import EXIT_REQUEUE
from maskmoe.training.watch import progress
from maskmoe.training.watch.callback import Step
from maskmoe.training.watch.progress import Progress

ARGS = Namespace(save=None, train_iters=9, log_interval=4, seq_length=32)


@pytest.fixture
def clock(monkeypatch):
    """Stand in for the time of the run, and for the rank, which is the only one."""
    monkeypatch.setattr(progress, "is_last_rank", lambda: True)
    monkeypatch.setattr(progress, "_TORCHRUN_DELAY", 0.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    clock = Namespace(now=100.0)
    return clock


def test_losses_are_means_since_the_line_before(clock, capsys):
    """The first step has a line of its own. Iteration 6 has not updated the weights, and so has no loss."""
    run = Progress(ARGS)
    for iteration in range(3, 10):
        clock.now += 100.0 if iteration == 3 else 2.0
        run.after_step(Step(iteration, 8, {"lm loss": torch.tensor(float(iteration))}, 1.0, iteration != 6))
    run.on_end(None)
    assert capsys.readouterr().out.splitlines() == [
        "iteration 3/9 (33%)  loss 3.0000",
        "iteration 4/9 (44%)  loss 4.0000  128 tokens/s  0:00:10 left",
        "iteration 8/9 (89%)  loss 6.6667  128 tokens/s  0:00:02 left  1 steps without an update",
        "complete: 9 iterations, loss 6.6667; no checkpoint was saved",
    ]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (None, "complete: 9 iterations; checkpoint 20 is in"),
        (SystemExit(0), "stopped: saved iteration 20 in"),
        (SystemExit(EXIT_REQUEUE), "stopped: saved iteration 20 in"),
        (SystemExit(65), None),
        (RunFailure("a disk is full"), None),
    ],
)
def test_last_line_says_how_the_run_ended(clock, capsys, tmp_path, error, line):
    write_checkpoint(tmp_path, 20)
    Progress(Namespace(**vars(ARGS) | {"save": str(tmp_path)})).on_end(error)
    assert capsys.readouterr().out.startswith(f"{line} {tmp_path}" if line else "\n"[1:])
    assert bool(line) == bool(error is None or error.args in ((0,), (EXIT_REQUEUE,)))


@pytest.mark.runs("expert parallel 2, undisturbed", "pipeline 2")
def test_printed_losses_are_those_of_the_curve(runs):
    """Each line of a run with `--log-interval 1` has the loss of its step, also after a resume."""
    for run in runs:
        lines = re.findall(r"^iteration (\d+)/21 \(\d+%\)  loss ([\d.]+)", (run.folder / "out1.log").read_text(), re.M)
        assert [int(iteration) for iteration, _ in lines] == run.iterations
        losses = run.curves["lm loss"]
        assert all(abs(float(loss) - losses[int(iteration)]) < 1e-4 for iteration, loss in lines)
