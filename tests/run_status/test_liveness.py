"""Whether a run is alive follows from its lock, its journal, and the times of its files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.paths import ROOT

from maskmoe.files.run_folder import Entry, Kind
from maskmoe.run_status.liveness import read_liveness
from maskmoe.run_status.progress import Progress

HOLD_LOCK = """
import sys
from pathlib import Path
from maskmoe.processes.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""
UNDER_WAY = Progress(iteration=20, total=40, seconds_per_iteration=1.0)
COMPLETE = Progress(iteration=40, total=40)


@pytest.fixture
def hold_lock():
    """Start processes that hold the lock of a folder."""
    processes = []

    def hold_lock(folder):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-c", HOLD_LOCK, folder]
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        processes.append(process)
        assert process.stdout.readline() == b"locked\n"
        return process

    yield hold_lock
    for process in processes:
        process.kill()
        process.communicate()


def entry(kind, ago, text="an entry"):
    return Entry(kind, text, time.time() - ago, "host")


def test_running_killed_and_ended_runs(tmp_path, hold_lock):
    """The status sees the lock of another process, and what a killed process has left behind."""
    started = [entry(Kind.STARTED, 5000)]
    process = hold_lock(tmp_path)
    liveness = read_liveness(tmp_path, started, time.time(), UNDER_WAY)
    assert (liveness.state, liveness.reason) == (
        "running",
        f"process {process.pid} on host {os.uname().nodename} holds the lock",
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    liveness = read_liveness(tmp_path, started, time.time(), UNDER_WAY)
    assert liveness.state == "lost"
    assert f"process {process.pid} on host" in liveness.reason
    ended = [*started, entry(Kind.ENDED, 1, "rank 1 was ended by signal 9")]
    assert read_liveness(tmp_path, ended, time.time(), UNDER_WAY).reason == "rank 1 was ended by signal 9"
    hold_lock(tmp_path).communicate()
    assert read_liveness(tmp_path, [], time.time(), UNDER_WAY).state == "ended"
    assert read_liveness(tmp_path, [], time.time(), COMPLETE).state == "finished"


def test_lock_of_another_host_needs_a_fresh_touch(tmp_path):
    lock = tmp_path / ".run.lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    assert read_liveness(tmp_path, [], None, UNDER_WAY).state == "running"
    old = time.time() - 60
    os.utime(lock, (old, old))
    assert read_liveness(tmp_path, [], None, UNDER_WAY).state == "lost"


# A run without checkpoints, and so without a lock: its history, the age of what it wrote, and its state.
WITHOUT_LOCK = [
    ([], 10, "running", "it wrote something a short time ago"),
    ([], 5000, "unknown", "it has no lock"),
    ([], None, "unknown", "it has no lock"),
    ([Kind.LAUNCHED], 10, "running", "its journal has no end, and it wrote something a short time ago"),
    ([Kind.STARTED, Kind.WARNED], 10, "running", "its journal has no end, and it wrote something a short time ago"),
    ([Kind.STARTED], 5000, "lost", "its journal has no end, but it has written nothing for a while"),
    ([Kind.STARTED, Kind.ENDED], 10, "ended", "an entry"),
    ([Kind.STARTED, Kind.NODES], 5000, "running", "its nodes meet again: an entry"),
]


@pytest.mark.parametrize(("kinds", "age", "state", "reason"), WITHOUT_LOCK)
def test_run_without_a_lock(kinds, age, state, reason):
    last_sign = None if age is None else time.time() - age
    liveness = read_liveness(None, [entry(kind, 10) for kind in kinds], last_sign, UNDER_WAY)
    assert (liveness.state, liveness.reason) == (state, reason)


def test_slow_run_may_be_silent_for_longer():
    slow = Progress(iteration=20, total=40, seconds_per_iteration=600.0)
    assert read_liveness(None, [entry(Kind.STARTED, 9000)], time.time() - 5000, slow).state == "running"


def test_start_succeeds_while_the_lock_is_read(tmp_path):
    """Another process reads the lock all the time while runs start; none is refused or delayed."""
    program = "import sys; from pathlib import Path; from maskmoe.processes.folder_lock import look_at_lock\n"
    program += "print(1, flush=True)\nwhile True: look_at_lock(Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, env=environment)
    reader.stdout.readline()
    try:
        lock_often = (
            "import sys; from pathlib import Path; from maskmoe.processes.folder_lock import locked_folder\n"
            "for _ in range(200):\n"
            "    with locked_folder(Path(sys.argv[1])): pass\n"
        )
        subprocess.run([sys.executable, "-c", lock_often, tmp_path], check=True, env=environment, timeout=60)
        assert reader.poll() is None
    finally:
        reader.kill()
        reader.communicate()
