"""A plan in a process of its own is interrupted, killed, or started twice."""

import signal
import sys

import psutil
import pytest
from support.waiting import wait_until

from maskmoe.workflow.lock import locked

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports a parent's end and lock holders")


def test_ctrl_c_stops_the_stage_in_order_and_the_next_run_resumes(stub_run, capsys):
    process = stub_run.start_and_wait_for_half()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.endswith("interrupted; start the same command again to resume\n")
    assert (stub_run.folder / "ended-in-order").exists()
    stub_run.release()
    stub_run.take_starts()
    stub_run.run()
    assert "[2/3] steps     resumes" in capsys.readouterr().out
    assert stub_run.take_starts() == ["steps", "last"]
    assert stub_run.output("last").read_text() == "10"


def test_signals_are_handled_as_before_when_the_plan_has_ended(stub_run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    stub_run.run()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


def test_an_ignored_signal_stays_ignored(stub_run):
    """`nohup` starts a command with SIGHUP ignored, so that the command survives the end of its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = stub_run.start_and_wait_for_half()
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    stub_run.release()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert stub_run.take_starts() == ["first", "steps", "last"]


def test_other_settings_after_an_interruption_start_from_nothing(stub_run):
    process = stub_run.start_and_wait_for_half()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    stub_run.release()
    stub_run.flags["steps"] = ["--setting", "new"]
    stub_run.run()
    assert (stub_run.files.previous / "steps.out").read_text() == "5"
    assert stub_run.output("last").read_text() == "10"


@only_linux
def test_kill_stops_the_stage_too_and_the_next_run_waits_for_the_stage(stub_run):
    process = stub_run.start_and_wait_for_half()
    process.kill()
    process.communicate()
    stub_run.release()
    stub_run.run()
    assert (stub_run.folder / "ended-in-order").exists()
    assert stub_run.take_starts() == ["first", "steps", "steps", "last"]
    assert stub_run.output("last").read_text() == "10"


def stage_and_worker(process):
    """The process of the running stage, and the stage's child, which does the work."""
    (stage,) = psutil.Process(process.pid).children()
    (worker,) = stage.children()
    return stage, worker


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@only_linux
def test_workers_of_a_killed_stage_are_killed(stub_run):
    process = stub_run.start_and_wait_for_half()
    stage, worker = stage_and_worker(process)
    stage.kill()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "a process was killed" in output
    wait_until(lambda: has_ended(worker))


@only_linux
def test_next_run_kills_the_workers_that_a_killed_run_has_left(stub_run):
    process = stub_run.start_and_wait_for_half()
    stage, worker = stage_and_worker(process)
    # A suspended stage cannot stop its worker.
    stage.suspend()
    process.kill()
    process.communicate()
    stage.kill()
    assert not has_ended(worker)
    with locked(stub_run.files.lock, seconds_to_end=0.1):
        wait_until(lambda: has_ended(worker))


def test_second_command_in_the_same_folder_is_refused(stub_run):
    process = stub_run.start_and_wait_for_half()
    second = stub_run.start()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert output == (
        f"error: another command (process {process.pid}) is at work in {stub_run.folder}; give another --run-dir\n"
    )
    stub_run.release()
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert stub_run.take_starts() == ["first", "steps", "last"]
