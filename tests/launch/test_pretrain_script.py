"""`launch/pretrain.sh`: real runs of a smaller laptop model, undisturbed and disturbed."""

import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.launchers import Launch
from support.paths import ROOT
from support.runs import make_laptop_data, read_losses

from maskmoe.checkpoint.series import read_tracker
from maskmoe.processes.interruption import EXIT_REQUEUE

SCRIPT = ROOT / "launch" / "pretrain.sh"
LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
ITERATIONS = 21
SMALLER = f"""
    --hidden-size 32 --num-attention-heads 2 --moe-ffn-hidden-size 32 --seq-length 32 --max-position-embeddings 32
    --train-iters {ITERATIONS} --lr-warmup-fraction false --lr-warmup-iters 3
    --save-interval 7 --eval-iters 1 --log-interval 1 --tensorboard-log-interval 1 --expert-model-parallel-size 2
"""
HEADER = ["model", "parameters", "layout", "step", "dispatch", "mask", "data", "start", "folder"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a file that must not replace a module of Python."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "random.py").write_text("raise ImportError('a file of the current folder was imported')\n")
    return folder


@pytest.fixture(scope="module")
def start(folder) -> Callable[..., Launch]:
    """Start `launch/pretrain.sh` on the smaller laptop model; use the result as a context manager."""
    data = make_laptop_data(folder, num_documents=30)

    def start(name: str, options: str = "", flags: str = "") -> Launch:
        options = [*("--nproc-per-node", "2", "--run-dir", f"runs/{name}"), *shlex.split(options)]
        command = [str(SCRIPT), *options, str(LAPTOP), *shlex.split(f"{SMALLER} {data} {flags}")]
        return Launch(command, folder, folder / "runs" / name, {})

    return start


@pytest.fixture(scope="module")
def undisturbed(folder, start) -> dict[int, float]:
    """Return the losses of a run on two processes, started by the line that `--dry-run` prints."""
    with start("undisturbed", "--dry-run") as launch:
        assert launch.wait() == 0, launch.output
        assert not launch.run_dir.exists()
        (line,) = launch.output.splitlines()
    with Launch(["bash", "-c", line], folder, launch.run_dir, {}) as pasted:
        assert pasted.wait() == 0, pasted.output[-4000:]
    curve = read_losses(launch.run_dir)
    assert list(curve) == list(range(1, ITERATIONS + 1))
    return curve


def assert_quiet(launch: Launch, last: str) -> None:
    """Check the console of a run: a header, a few lines of loading, Megatron's lines, and one line at the end."""
    lines = launch.output.splitlines()
    assert lines[-1].partition("]: ")[2].startswith(last)
    first = next(number for number, line in enumerate(lines) if " iteration  " in line)
    assert first < 25
    from_rank = [line.removeprefix("[rank0]: ") for line in lines[:first] if line.startswith("[rank0]: ")]
    header = [line for line in from_rank if not line.startswith(("loading: ", "note: "))]
    assert [line.split()[0] for line in header[:9]] == HEADER
    assert len(header) <= 15
    for noise in ("end of arguments", "DEPRECATED", "Warning", "Traceback", "torch/distributed"):
        assert noise not in launch.output
    log = (launch.run_dir / "logs" / "rank0.log").read_text()
    assert "end of arguments" in log


class Stopped(NamedTuple):
    """A run that a signal has stopped, with the contents of its folder at that time.

    Attributes:
        launch: The command, which has ended.
        saved: The iteration of the newest checkpoint.
        losses: The losses by iteration.
    """

    launch: Launch
    saved: int
    losses: dict[int, float]


@pytest.fixture(scope="module")
def stopped(start) -> Stopped:
    with start("signalled") as launch:
        launch.wait_for_iteration(9)
        os.killpg(launch.process.pid, signal.SIGTERM)
        assert launch.wait() == EXIT_REQUEUE, launch.output[-4000:]
    return Stopped(launch, read_tracker(launch.checkpoints), read_losses(launch.run_dir))


def test_signalled_run_saves(stopped):
    launch, saved, losses = stopped
    assert 9 <= saved < ITERATIONS
    assert list(losses)[-1] == saved
    assert "attempt_1" not in "".join(map(str, launch.run_dir.rglob("*")))
    assert_quiet(launch, f"stopped: saved iteration {saved} in {launch.checkpoints}; the same command resumes")


def test_same_command_resumes_a_stopped_run(stopped, start, undisturbed):
    with start("signalled") as again:
        assert again.wait() == 0, again.output[-4000:]
    assert f"at iteration {stopped.saved}" in again.output
    assert_quiet(again, f"complete: {ITERATIONS} iterations, loss ")
    assert read_losses(again.run_dir) == undisturbed
    logs = sorted((again.run_dir / "logs" / "node0").glob("*/attempt_0/*/stdout.log"))
    assert len(logs) == 4
    assert all(log.stat().st_size for log in logs)


@pytest.mark.slow
def test_second_run_in_a_folder_is_refused(start):
    endless = "--train-iters 100000 --save-interval 100000"
    with start("locked", flags=endless) as launch:
        launch.wait_for_iteration(1)
        with start("locked", flags=endless) as second:
            assert second.wait() == 2, second.output[-4000:]
        (error,) = [line for line in second.output.splitlines() if "error: " in line]
        assert f"process {launch.pid_of_rank(0)} on host {os.uname().nodename}" in error
        assert launch.process.poll() is None


@pytest.mark.slow
def test_stopped_rank_ends_the_run(start):
    """The other rank waits until its process groups time out. The launcher kills the rank that handles no signals."""
    flags = "--train-iters 100000 --save-interval 100000 --distributed-timeout-seconds-after-init 5"
    with start("stopped", "--max-restarts 0", flags) as launch:
        launch.wait_for_iteration(9)
        os.kill(launch.pid_of_rank(1), signal.SIGSTOP)
        begin = time.monotonic()
        assert launch.wait() == 1, launch.output[-4000:]
        assert time.monotonic() - begin < 60
    assert "rank 1 was ended by signal 9 (SIGKILL)" in launch.output


def test_signal_before_the_ranks_train(start):
    """The signal arrives while the ranks are loading, so there is nothing to save."""
    with start("early") as launch:
        launch.wait_for_output("loading: importing")
        os.killpg(launch.process.pid, signal.SIGINT)
        assert launch.wait() == EXIT_REQUEUE, launch.output
    assert not launch.checkpoints.exists()


def test_bad_input_ends_the_run_at_once_with_one_line(start):
    """All ranks refuse the input, before any process group exists, and are not restarted."""
    with start("refused", flags="--moe-router-topp 3") as launch:
        assert launch.wait() == 2, launch.output[-4000:]
    (error,) = [line for line in launch.output.splitlines() if "error: " in line]
    assert "--moe-router-topp (nearest: --moe-router-topk)" in error
    assert "attempt_1" not in "".join(map(str, launch.run_dir.rglob("*")))
    assert not launch.checkpoints.exists()
