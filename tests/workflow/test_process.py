"""Commands of stages as processes."""

import sys
import time

import pytest

from maskmoe.workflow.lock import locked
from maskmoe.workflow.process import StageProcess, read_lines, read_log


@pytest.fixture
def start(tmp_path):
    """Start a Python program whose output goes to the file `log`."""
    with locked(tmp_path / ".lock") as lock:

        def start(program, **environment):
            return StageProcess((sys.executable, "-c", program), environment, tmp_path / "log", lock)

        yield start


def test_output_of_both_streams_is_appended_to_the_log(start, tmp_path):
    (tmp_path / "log").write_text("earlier\n")
    process = start("import sys; print('out', flush=True); print('err', file=sys.stderr)")
    process.wait(30)
    assert process.exit_code == 0
    assert list(process.new_lines()) == ["out", "err"]
    assert read_log(tmp_path / "log") == ["earlier", "out", "err"]


def test_environment_is_extended(start):
    process = start("import os; print(os.environ['A'], 'PATH' in os.environ)", A="b c")
    process.wait(30)
    assert list(process.new_lines()) == ["b c True"]


def test_modules_of_the_current_folder_do_not_replace_the_standard_library(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    process = start("import random")
    process.wait(30)
    assert process.exit_code == 0


def test_running_command_has_no_exit_code_until_it_is_stopped(start):
    process = start("import time; time.sleep(60)")
    process.wait(0.05)
    assert process.exit_code is None
    process.stop()
    assert process.exit_code == -15


def test_stop_leaves_time_to_end_in_order(start):
    process = start(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(3)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    deadline = time.monotonic() + 30
    lines = []
    while not lines and time.monotonic() < deadline:
        lines += process.new_lines()
        time.sleep(0.01)
    process.stop()
    assert [*lines, *process.new_lines()] == ["ready", "saved"]
    assert process.exit_code == 3


def test_stop_ends_no_other_command_that_holds_the_same_lock(start):
    first, second = start("import time; time.sleep(60)"), start("import time; time.sleep(60)")
    first.stop()
    assert second.exit_code is None
    second.stop()


def test_only_complete_lines_are_read(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\ntw")
    lines, position = read_lines(log)
    assert lines == ["one"]
    with open(log, "ab") as stream:
        stream.write(b"o\nthree\n")
    assert read_lines(log, position) == (["two", "three"], log.stat().st_size)


def test_missing_log_has_no_lines(tmp_path):
    assert read_log(tmp_path / "log") == []
