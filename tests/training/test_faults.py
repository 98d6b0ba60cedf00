"""What goes wrong in long runs, done to real processes: nothing is lost, and the user is told."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from maskmoe.checkpoint.integrity import check_content, check_structure
from maskmoe.checkpoint.series import checkpoint_path, read_tracker, saved_iterations
from maskmoe.interruption import EXIT_HANG, EXIT_REQUEUE

PROGRAM = str(Path(__file__).with_name("pretrain_with_fault.py"))
EXPERT_2 = "--expert-model-parallel-size 2"
# The same run, left alone. `SETTINGS` has it save at 7, 14 and 21, and end at 21.
UNDISTURBED = pytest.mark.runs("expert parallel 2, undisturbed")

StartFaulty = Callable[..., "RankProcesses"]  # noqa: F821


@pytest.fixture
def start_faulty(workplace, new_run, tmp_path) -> StartFaulty:
    """Start a run of two ranks that saves, resumes and meets a fault; to be used as a context manager."""

    def start_faulty(
        kind: str = "none", flags: str = "", rank: int = 1, iteration: int = 10, name: str = "run", **settings
    ):
        run = new_run(f"{EXPERT_2} {flags}", ranks=2, saves=True, program=(PROGRAM,), **settings)
        environment = {
            "FAULT": kind,
            "FAULT_RANK": str(rank),
            "FAULT_ITERATION": str(iteration),
            "FAULT_FOLDER": str(tmp_path),
        }
        # All incarnations of the run save to, and load from, the same folder.
        run = replace_flags(run, f"--save {tmp_path}/save --load {tmp_path}/save")
        return workplace.start(run, tmp_path / name, environment=environment)

    return start_faulty


def replace_flags(run, flags: str):
    return type(run)(**{**vars(run), "flags": f"{run.flags} {flags}"})


def is_sound(checkpoint: Path) -> bool:
    check_structure(checkpoint)
    check_content(checkpoint)
    return True


@UNDISTURBED
def test_killed_rank_is_started_again(runs, start_faulty, tmp_path):
    (undisturbed,) = runs
    with start_faulty(torchrun=True, restarts=1) as processes:
        processes.wait_for_iteration(9)
        os.kill(processes.pid_of_rank(1), signal.SIGKILL)
        outcome = processes.wait()
    assert outcome.exit_codes == (0,), outcome.report()
    assert "at iteration 7" in processes.output
    assert outcome.iterations == undisturbed.iterations
    assert outcome.difference(undisturbed) == 0


@pytest.mark.parametrize("flags", ["", "--async-save"])
@pytest.mark.slow
@UNDISTURBED
def test_killed_while_saving(runs, start_faulty, tmp_path, flags):
    """The first checkpoint that is whole stays so, and the unfinished one is not loaded, but written again."""
    (undisturbed,) = runs
    unfinished = checkpoint_path(tmp_path / "save", 14) / "__1_0.distcp"
    with start_faulty("slow-save", flags, torchrun=True, restarts=1) as processes:
        processes.wait_until(lambda: "saved checkpoint from iteration       7" in processes.output)
        processes.wait_until(unfinished.exists)
        helpers = psutil.Process(processes.pid_of_rank(1)).children(recursive=True)
        os.kill(processes.pid_of_rank(1), signal.SIGKILL)
        outcome = processes.wait()
    assert outcome.exit_codes == (0,), outcome.report()
    assert "at iteration 7" in processes.output
    assert bool(helpers) == bool(flags)
    assert not any(helper.is_running() for helper in helpers)
    assert outcome.difference(undisturbed) == 0
    assert saved_iterations(tmp_path / "save") == [21, 14, 7]
    assert all(is_sound(checkpoint_path(tmp_path / "save", iteration)) for iteration in (7, 14, 21))


@pytest.mark.slow
def test_writer_ends_with_its_rank(start_faulty):
    """Also where no launcher is left to end it: the run that takes its place may save the same checkpoint."""
    with start_faulty(flags="--async-save") as processes:
        processes.wait_for_iteration(8)
        helpers = psutil.Process(processes.pids[1]).children(recursive=True)
        assert len(helpers) >= 3  # the writer, its fork server, the queue for its results
        os.kill(processes.pids[1], signal.SIGKILL)
        _, alive = psutil.wait_procs(helpers, timeout=10)
    assert alive == []


@pytest.mark.parametrize(
    "number, ranks, flags",
    [
        (signal.SIGUSR1, (0, 1), "--num-workers 1 --async-save"),
        (signal.SIGTERM, (0, 1), "--num-workers 1"),
        (signal.SIGTERM, (1,), "--async-save"),
    ],
)
@pytest.mark.slow
@UNDISTURBED
def test_signal_saves_and_asks_to_be_requeued(runs, start_faulty, tmp_path, number, ranks, flags):
    """The signal goes to whole process groups, as torchrun's and Slurm's do: data loaders and writers get it, too."""
    (undisturbed,) = runs
    with start_faulty(flags=flags) as processes:
        processes.wait_for_iteration(9)
        for rank in ranks:
            os.killpg(processes.pids[rank], number)
        interrupted = processes.wait(all_end=True)
    assert interrupted.exit_codes == (EXIT_REQUEUE, EXIT_REQUEUE), interrupted.report()
    saved = read_tracker(tmp_path / "save")
    assert saved == interrupted.iterations[-1] >= 9
    with start_faulty(flags=flags, name="again") as processes:
        resumed = processes.wait()
    assert resumed.exit_codes == (0, 0), resumed.report()
    assert resumed.iterations == list(range(saved + 1, 22))
    assert resumed.difference(undisturbed) == 0


def test_sigterm_while_starting_ends_the_run_at_once(start_faulty):
    """Though a rank waits for another, where Python sees no signals; torchrun would kill it after 30 seconds."""
    with start_faulty("slow-start", torchrun=True) as processes:
        processes.wait_until(lambda: "starts slowly" in processes.output)
        ranks = [processes.pid_of_rank(rank) for rank in (0, 1)]
        start = time.monotonic()
        os.kill(processes.pids[0], signal.SIGTERM)
        processes.wait()
    assert time.monotonic() - start < 15
    assert not any(psutil.pid_exists(rank) for rank in ranks)


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(start_faulty, tmp_path):
    with start_faulty(torchrun=True) as processes:
        processes.wait_for_iteration(9)
        os.kill(processes.pids[0], signal.SIGTERM)
        outcome = processes.wait()
    assert outcome.exit_codes != (0,)
    assert read_tracker(tmp_path / "save") == outcome.iterations[-1] >= 9


@pytest.mark.parametrize(
    "kind, exit_code, verdict, newest",
    [
        ("nan", 17, "not so when the step was repeated", 7),
        ("nan-always", 16, "so again when the step was repeated", 9),
    ],
)
@pytest.mark.slow
def test_nan_gradient_ends_the_run(start_faulty, tmp_path, kind, exit_code, verdict, newest):
    """Megatron repeats the step; what happens again may be the model's fault, so it saves to go on elsewhere."""
    with start_faulty(kind, iteration=10) as processes:
        outcome = processes.wait(all_end=True)
    assert outcome.exit_codes == (exit_code, exit_code), outcome.report()
    error = re.search(r"^error: (.*)$", outcome.errors[0], re.MULTILINE)[1]
    assert verdict in error
    assert error.endswith(f"The newest checkpoint is of iteration {newest}")
    assert outcome.iterations[-1] == 9
    assert read_tracker(tmp_path / "save") == newest


@pytest.mark.parametrize(
    "rank, stops, culprit",
    [
        (1, False, r"rank 1 \(host .*, process \d+\) stands still .*pretrain_with_fault\.py:\d+ in forward"),
        pytest.param(1, True, r"rank 1 \(host .*\) shows no sign of life", marks=pytest.mark.slow),
        pytest.param(0, True, "the store of the ranks was silent", marks=pytest.mark.slow),
    ],
)
def test_hanging_rank_is_named(start_faulty, rank, stops, culprit):
    """It sleeps, or its whole process is stopped; then it cannot end itself, and the launcher will."""
    timeout = 5
    with start_faulty("none" if stops else "hang", f"--hang-timeout {timeout}", rank=rank) as processes:
        processes.wait_for_iteration(9)
        if stops:
            os.kill(processes.pids[rank], signal.SIGSTOP)
        start = time.monotonic()
        outcome = processes.wait(all_end=not stops)
    assert time.monotonic() - start < 4 * timeout
    assert outcome.exit_codes[1 - rank] == EXIT_HANG, outcome.report()
    if not stops:
        assert outcome.exit_codes[rank] == EXIT_HANG
        assert "time.sleep" in outcome.errors[rank]
    assert re.search(culprit, "".join(outcome.errors)), outcome.report()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_shrinking_data_file(workplace, start_faulty, tmp_path, workers):
    for suffix in (".bin", ".idx"):
        shutil.copy((workplace.folder / "data").with_suffix(suffix), tmp_path / f"data{suffix}")
    with start_faulty(flags=f"--data-path {tmp_path}/data --num-workers {workers}") as processes:
        processes.wait_for_iteration(8)
        os.truncate(tmp_path / "data.bin", 1000)
        outcome = processes.wait()
    assert 1 in outcome.exit_codes, outcome.report()
    assert re.search(rf"^error: {tmp_path}/data.bin has shrunk from \d+ to 1000 bytes", "".join(outcome.errors), re.M)


@pytest.mark.parametrize("flags", ["", pytest.param("--async-save", marks=pytest.mark.slow)])
def test_full_disk(workplace, new_run, tmp_path, flags):
    """On a file system of its own, where one checkpoint fits and two do not."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    save = tmp_path / "save"
    save.mkdir()
    run = new_run(f"{EXPERT_2} {flags} --save {save} --load {save}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    on_small_disk = f'mount -t tmpfs -o size=4m tmpfs {save} && {{ "$@"; cp -r {save} {tmp_path}/left; }}'
    outcome = subprocess.run(
        ["unshare", "-rm", "sh", "-c", on_small_disk, "sh", *torchrun, *run.program, *workplace.flags(run, tmp_path)],
        cwd=workplace.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    error = re.search(r"^error: (cannot save a checkpoint.*)$", outcome.stderr, re.MULTILINE)
    assert error, outcome.stderr[-4000:]
    assert "no space is left there" in error[1]
    assert error[1].endswith("The newest checkpoint is of iteration 7")
    assert saved_iterations(tmp_path / "left") == [7]
    assert is_sound(checkpoint_path(tmp_path / "left", 7))
