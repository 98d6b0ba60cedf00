"""`maskmoe status` describes real runs: while they train, after they were killed, and after their end."""

import os
import re
import signal

import pytest
from support.runs import read_scalars
from support.training import Run

from maskmoe.comparison.table import scalars
from maskmoe.run_status.status import read_status

EXPERT_2 = "--expert-model-parallel-size 2"


@pytest.mark.runs("expert parallel 2, undisturbed")
def test_status_of_an_ended_run(runs):
    (run,) = runs
    logged = read_scalars(run.folder)
    status = read_status(run.checkpoints)
    assert status.liveness.state == "finished"
    newest = {tag: events[-1] for tag, events in logged.items()}
    assert (status.progress.iteration, status.progress.loss) == (21, pytest.approx(newest["lm loss"].value, rel=1e-5))
    assert status.progress.held_out_loss == newest["lm loss validation"].value
    assert status.logged.scalars["lm loss"] == logged["lm loss"]
    assert [each.iteration for each in status.checkpoints.saved] == [21, 14, 7]
    assert {each.soundness for each in status.checkpoints.saved} == {"complete"}
    for each in status.checkpoints.saved:
        assert each.size == sum(path.stat().st_size for path in each.path.iterdir() if path.is_file())
    assert status.checkpoints.next_start == run.checkpoints / "iter_0000021"


@pytest.mark.slow
def test_validation_loss_is_not_that_of_the_test_part(workplace, tmp_path):
    """Megatron logs the loss of the test set under the tag and the iteration of the last validation."""
    outcome = workplace.run(Run("--split 80,10,10 --train-iters 4 --eval-interval 10"), tmp_path / "run")
    printed = dict(re.findall(r"iteration 4 on (\w+) set \| lm loss value: (\S+)", outcome.output))
    assert printed.keys() == {"validation", "test"}
    assert printed["validation"] != printed["test"]
    loss = pytest.approx(float(printed["validation"]), rel=1e-6)
    assert scalars(outcome.folder / "tensorboard", "lm loss validation") == [(4, loss)]
    assert read_status(outcome.folder).progress.held_out_loss == loss
    assert f"validation loss {float(printed['validation']):.4f}; " in outcome.output


@pytest.mark.slow
def test_status_while_training_and_after_kill(workplace, tmp_path):
    folder = tmp_path / "run"
    flags = f"{EXPERT_2} --train-iters 2000 --save-interval 5 --save {folder}/checkpoints"
    with workplace.start(Run(flags, ranks=2), folder) as processes:
        processes.wait_for_iteration(12)
        logged = [int(number) for number in re.findall(r"iteration +(\d+)/ +2000", processes.output)]
        status = read_status(folder)
        assert status.liveness.state == "running"
        assert f"process {processes.pids[0]} " in status.liveness.reason
        assert max(logged) <= status.progress.iteration < 2000
        assert status.progress.seconds_left > 0
        assert status.checkpoints.next_start is not None
        for pid in processes.pids:
            os.kill(pid, signal.SIGKILL)
        outcome = processes.wait(all_end=True)
    assert outcome.exit_codes == (-9, -9)
    lines = re.findall(r"iteration +(\d+)/ +2000 .*lm loss: (\S+)", processes.output)
    status = read_status(folder)
    assert status.liveness.state == "lost"
    assert status.progress.iteration == int(lines[-1][0])
    assert status.progress.loss == pytest.approx(float(lines[-1][1]), rel=1e-5)
    sound = [each for each in status.checkpoints.saved if each.soundness == "complete"]
    assert status.checkpoints.next_start == sound[0].path
