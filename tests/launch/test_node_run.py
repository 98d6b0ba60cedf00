"""The supervisor of torchrun, with other commands than torchrun."""

import signal
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest
from support.launch import Launch

from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE

SUPERVISE = """
import sys
from maskmoe.processes.run_tool import run_tool
from maskmoe.launch import node_run
from maskmoe.launch.command import Command
program, shutdown_timeout, node_run._HANG_TIMEOUT = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
node_run._INSPECTION_INTERVAL = node_run._HANG_TIMEOUT / 4
command = Command((sys.executable, "-c", program), {})
supervisor = node_run.Supervisor(shutdown_timeout, saves_checkpoints=True)
run_tool(lambda: (node_run.say("starting"), sys.exit(supervisor.run(command))))
"""
READY = "print('ready', flush=True)"
LEAVE_EXIT_CODE = "from maskmoe.processes.interruption import leave_exit_code; leave_exit_code({code})"


@pytest.fixture
def supervise(request, tmp_path) -> Callable[..., Launch]:
    """Start a supervisor that runs a Python program instead of torchrun."""

    def supervise(program: str, shutdown_timeout: float = 20, hang_timeout: float = 60) -> Launch:
        arguments = [program, str(shutdown_timeout), str(hang_timeout)]
        launch = Launch([sys.executable, "-c", SUPERVISE, *arguments], tmp_path, tmp_path / "run", {})
        request.addfinalizer(launch.kill)
        return launch

    return supervise


@pytest.mark.parametrize("code", [2, EXIT_REQUEUE, EXIT_HANG])
def test_exit_code_of_a_rank_stops_the_run_and_is_returned(supervise, code):
    launch = supervise(f"{LEAVE_EXIT_CODE.format(code=code)}; import time; time.sleep(1000)")
    assert launch.wait() == code


def test_run_of_nohup_survives_its_terminal(supervise):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launch = supervise(f"{READY}; import time; time.sleep(2); print('finished')")
    finally:
        signal.signal(signal.SIGHUP, before)
    launch.wait_for_output("ready")
    launch.process.send_signal(signal.SIGHUP)
    assert launch.wait() == 0
    assert "finished" in launch.output


@pytest.mark.parametrize("has_signal", [False, True])
def test_hung_command_is_killed(supervise, has_signal):
    """The program behaves like torchrun whose store does not answer: a rank has exited, and signals are ignored."""
    launch = supervise(
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        # The variable keeps the object alive, because Popen reaps its process when it is deleted.
        f"rank = subprocess.Popen(['true']); {LEAVE_EXIT_CODE.format(code=EXIT_HANG)}\n"
        "print('ready', flush=True); time.sleep(1000)",
        shutdown_timeout=2,
        hang_timeout=2,
    )
    launch.wait_for_output("ready")
    if has_signal:
        launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == EXIT_HANG
    assert "torchrun does not notice that a rank has exited" in launch.output


def test_stop_is_orderly_although_nothing_can_be_printed(monkeypatch):
    """The terminal may be gone, or the disk of a log file may be full."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # which hides that Python writes again when it exits
    program = (
        f"import os, signal, sys, time; {LEAVE_EXIT_CODE.split(';')[0]}\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), leave_exit_code({EXIT_REQUEUE}), sys.exit(1)))\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(1000)"
    )
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", SUPERVISE, program, "20", "60"]
        assert subprocess.run(words, stdout=full, stderr=full, timeout=60).returncode == EXIT_REQUEUE


@pytest.mark.parametrize("has_signal", [False, True])
def test_complete_training_is_no_stopped_run(supervise, has_signal):
    """After the training, the ranks still write a page, in peace unless a signal comes."""
    left = LEAVE_EXIT_CODE.format(code=0)
    launch = supervise(f"{left}; {READY}; import time; time.sleep({1000 if has_signal else 1}); print('page written')")
    launch.wait_for_output("ready")
    if has_signal:
        launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == 0
    assert ("page written" in launch.output) != has_signal
    assert "without saving" not in launch.output


def test_ranks_that_outlive_torchrun_may_save(supervise, tmp_path):
    """The command is killed. A process that it started in another session needs a second to save."""
    rank = (
        "import pathlib, signal, time\n"
        f"def save(*_): time.sleep(1); pathlib.Path('{tmp_path}/saved').touch(); exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(1000)"
    )
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    launch = supervise(command)
    launch.wait_for_output("ready")
    (child,) = psutil.Process(launch.process.pid).children()
    child.kill()
    assert launch.wait() == 128 + signal.SIGKILL
    assert (tmp_path / "saved").exists()


def test_killed_supervisor_stops_the_command(supervise):
    launch = supervise(f"{READY}; import time; time.sleep(1000)")
    launch.wait_for_output("ready")
    (child,) = psutil.Process(launch.process.pid).children()
    launch.process.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()
