"""Faults of long runs, done to real processes: no work is lost, and the user gets a reason."""

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
from support.launchers import CPU_ENVIRONMENT
from support.training import Run, TrainingProcesses

from maskmoe.checkpoint.integrity import check_content, check_structure
from maskmoe.checkpoint.reading import CheckpointError
from maskmoe.checkpoint.series import checkpoint_path, read_tracker, saved_iterations, write_tracker
from maskmoe.processes.interruption import EXIT_REQUEUE

PROGRAM = str(Path(__file__).with_name("pretrain_with_fault.py"))
EXPERT_2 = "--expert-model-parallel-size 2"
# The run without a fault. It saves at iterations 7, 14 and 21, and ends at 21.
UNDISTURBED = pytest.mark.runs("expert parallel 2, undisturbed")

StartFaulty = Callable[..., TrainingProcesses]


@pytest.fixture
def start_faulty(workplace, tmp_path) -> StartFaulty:
    """Start a run that saves, resumes and meets a fault; use the result as a context manager."""

    def start_faulty(
        kind: str = "none",
        flags: str = "",
        rank: int = 1,
        iteration: int = 10,
        name: str = "run",
        ranks: int = 2,
        **settings,
    ) -> TrainingProcesses:
        # All starts of one test save to, and load from, one folder.
        run = Run(
            f"{EXPERT_2 if ranks == 2 else ''} {flags} --save {tmp_path}/save --load {tmp_path}/save",
            ranks=ranks,
            program=(PROGRAM,),
            **settings,
        )
        environment = {
            "FAULT": kind,
            "FAULT_RANK": str(rank),
            "FAULT_ITERATION": str(iteration),
            "FAULT_FOLDER": str(tmp_path),
        }
        return workplace.start(run, tmp_path / name, environment=environment, are_preloaded=True)

    return start_faulty


def damages_in(save: Path) -> dict[int, str | None]:
    """Return the damage of each checkpoint in a folder by its iteration; None for a sound checkpoint."""
    return {iteration: damage_of(checkpoint_path(save, iteration)) for iteration in saved_iterations(save)}


def damage_of(checkpoint: Path) -> str | None:
    try:
        check_structure(checkpoint)
        check_content(checkpoint)
    except CheckpointError as damage:
        return str(damage)
    return None


@pytest.mark.parametrize("flags", ["", "--async-save"])
@pytest.mark.slow
@UNDISTURBED
def test_killed_while_saving(runs, start_faulty, tmp_path, flags):
    """The complete checkpoint stays intact; the unfinished checkpoint is not loaded but written again."""
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
    assert damages_in(tmp_path / "save") == {7: None, 14: None, 21: None}


@pytest.mark.slow
def test_writer_ends_with_its_rank(start_faulty):
    """No launcher is left that could end the writer, and the next run may write the same checkpoint."""
    with start_faulty(flags="--async-save") as processes:
        processes.wait_for_iteration(8)
        helpers = psutil.Process(processes.pids[1]).children(recursive=True)
        assert len(helpers) >= 3  # the writer, the queue for its results, Python's tracker of resources
        os.kill(processes.pids[1], signal.SIGKILL)
        _, alive = psutil.wait_procs(helpers, timeout=10)
    assert alive == []


def writer_of(rank: int) -> psutil.Process:
    """Return the process that writes the checkpoints of a rank, which Python has spawned."""
    (writer,) = (child for child in psutil.Process(rank).children() if "spawn_main" in " ".join(child.cmdline()))
    return writer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_writing", "iteration", "flags", "newest"),
    [(False, 7, "", 7), (True, 7, "", None), (True, 9, "--train-iters 9 --eval-iters 0", 7)],
    ids=["between saves", "saving", "last save"],
)
def test_killed_writer_ends_the_run(start_faulty, tmp_path, is_writing, iteration, flags, newest):
    """The rank ends, whether it would wait for the writer now, in the next save or after the last one."""
    flags = f"--async-save {flags}"
    with start_faulty("slow-save" if is_writing else "none", flags, rank=0, ranks=1) as processes:
        processes.wait_until((checkpoint_path(tmp_path / "save", iteration) / "__0_0.distcp").exists)
        if not is_writing:
            processes.wait_until(lambda: read_tracker(tmp_path / "save") == 7)
        writer_of(processes.pids[0]).kill()
        outcome = processes.wait()
    assert outcome.exit_codes == (1,), outcome.report()
    error = (
        r"^error: the process that writes checkpoints has died \(host \S+, process \d+, exit code -9\); .*start the run"
    )
    assert re.search(error, outcome.errors[0], re.M | re.I), outcome.report()
    assert read_tracker(tmp_path / "save") == newest


@pytest.mark.parametrize(
    ("number", "ranks", "flags"),
    [
        (signal.SIGUSR1, (0, 1), "--num-workers 1 --async-save"),
        (signal.SIGTERM, (0, 1), "--num-workers 1"),
        (signal.SIGTERM, (1,), "--async-save"),
    ],
)
@pytest.mark.slow
@UNDISTURBED
def test_signal_saves_and_asks_to_be_requeued(runs, start_faulty, tmp_path, number, ranks, flags):
    """As from torchrun and Slurm, the signal goes to process groups, so data loaders and writers get it, too."""
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
    """One rank waits for the other in a call in which Python handles no signals. torchrun kills after 30 seconds."""
    with start_faulty("slow-start", torchrun=True) as processes:
        processes.wait_until(lambda: "starts slowly" in processes.output)
        ranks = [processes.pid_of_rank(rank) for rank in (0, 1)]
        start = time.monotonic()
        os.kill(processes.pids[0], signal.SIGTERM)
        processes.wait()
    assert time.monotonic() - start < 15
    assert not any(psutil.pid_exists(rank) for rank in ranks)


@pytest.mark.parametrize(
    ("kind", "exit_code", "newest"),
    [
        ("nan", 17, 7),
        ("nan-always", 16, 9),
    ],
)
@pytest.mark.slow
def test_nan_gradient_ends_the_run(start_faulty, tmp_path, kind, exit_code, newest):
    """Megatron repeats the step. If the NaN comes again, the model may be at fault, so Megatron saves first."""
    with start_faulty(kind, iteration=10) as processes:
        outcome = processes.wait(all_end=True)
    assert outcome.exit_codes == (exit_code, exit_code), outcome.report()
    error = re.search(r"^error: (.*)$", outcome.errors[0], re.MULTILINE)[1]
    assert error.startswith("a loss or gradient was NaN or infinite")
    assert error.endswith(f"The newest checkpoint is of iteration {newest}")
    assert outcome.iterations[-1] == 9
    assert read_tracker(tmp_path / "save") == newest


@UNDISTURBED
@pytest.mark.parametrize(
    ("kind", "flags", "iteration", "ranks"),
    [
        ("nan-always", "--spike-deviations inf", 8, 1),
        ("nan-reduced", "", 9, 2),
        pytest.param("nan-always", "--no-check-for-nan-in-loss-and-grad", 9, 2, marks=pytest.mark.slow),
        pytest.param("nan-always", "", 8, 2, marks=pytest.mark.slow),
    ],
)
def test_nan_in_a_step_that_megatron_does_not_repeat_is_not_saved(
    runs, start_faulty, tmp_path, kind, flags, iteration, ranks
):
    """Megatron applies the update of the first step of a process, and of each step whose NaN its check does not see."""
    save = tmp_path / "save"
    shutil.copytree(checkpoint_path(runs[0].checkpoints, 7), checkpoint_path(save, 7))
    write_tracker(save, 7)
    flags = f"{flags} --save-interval 1 --keep-last-checkpoints 1"
    with start_faulty(kind, flags, rank=ranks - 1, iteration=iteration, ranks=ranks) as processes:
        outcome = processes.wait(all_end=True)
    assert outcome.exit_codes == (1,) * ranks, outcome.report()
    error = re.search(r"^error: (.*)$", outcome.errors[0], re.MULTILINE)[1]
    assert error.startswith(f"the loss or gradient of iteration {iteration} was NaN or infinite, and Megatron did not")
    assert error.endswith(f"The newest checkpoint is of iteration {iteration - 1}")
    assert damages_in(save) == {iteration - 1: None}


@pytest.mark.slow
def test_overflow_in_the_first_step_skips_the_update(start_faulty, tmp_path):
    """A constant loss scale keeps Megatron's check for NaN, and an update that is skipped leaves the weights sound."""
    flags = "--fp16 --loss-scale 1024 --exit-interval 2 --eval-iters 0"
    with start_faulty("nan-always", flags, rank=0, iteration=1, ranks=1) as processes:
        outcome = processes.wait()
    assert outcome.exit_codes == (0,), outcome.report()
    assert (tmp_path / "fault-happened").exists()
    assert read_tracker(tmp_path / "save") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rank"), [("hang", 1), ("none", 0), ("none", 1)])
def test_rank_that_waits_for_a_hanging_rank_fails(start_faulty, kind, rank):
    """One rank sleeps, or its process is stopped; the timeout of the process groups ends the other rank."""
    timeout = 5
    flags = f"--distributed-timeout-seconds-after-init {timeout} --eval-iters 0"
    with start_faulty(kind, flags, rank=rank) as processes:
        processes.wait_for_iteration(9)
        if kind == "none":
            os.kill(processes.pids[rank], signal.SIGSTOP)
        start = time.monotonic()
        outcome = processes.wait()
    assert time.monotonic() - start < 4 * timeout
    assert outcome.exit_codes[1 - rank] == 1, outcome.report()


@pytest.mark.slow
def test_data_file_that_becomes_shorter_is_named_by_the_next_start(workplace, start_faulty, tmp_path):
    for suffix in ("bin", "idx"):
        shutil.copy(workplace.folder / f"data.{suffix}", tmp_path)
    flags = f"--data-path {tmp_path}/data --num-workers 2 --train-iters 1000 --save-interval 1000"
    with start_faulty(flags=flags, ranks=1, torchrun=True, restarts=1) as processes:
        processes.wait_for_iteration(3)
        os.truncate(tmp_path / "data.bin", 0)
        outcome = processes.wait()
    assert outcome.exit_codes == (1,), outcome.report()
    assert "insufficient shared memory (shm)" in outcome.errors[0]
    assert f"{tmp_path}/data.bin has 0 bytes, but" in outcome.errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_full_disk(workplace, tmp_path, flags):
    """One checkpoint fits on the run's file system, two do not."""
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    save = tmp_path / "save"
    save.mkdir()
    run = Run(f"{EXPERT_2} {flags} --save {save} --load {save}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    on_small_disk = f'mount -t tmpfs -o size=4m tmpfs {save} && {{ "$@"; cp -r {save} {tmp_path}/left; }}'
    outcome = subprocess.run(
        ["unshare", "-rm", "sh", "-c", on_small_disk, "sh", *torchrun, *run.program, *workplace.flags(run, tmp_path)],
        cwd=workplace.folder,
        env=os.environ | CPU_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    error = re.search(r"^error: (cannot save a checkpoint.*)$", outcome.stderr, re.MULTILINE)
    assert error, outcome.stderr[-4000:]
    cause = f"no space is left in {save}: make space, and start the run again"
    assert error[1] == f"cannot save a checkpoint to {save}: {cause}. The newest checkpoint is of iteration 7"
    assert damages_in(tmp_path / "left")[7] is None
