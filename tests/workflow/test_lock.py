"""Only one command at a time works in a folder."""

import os
import subprocess
import sys

import pytest

from maskmoe.errors import UserError
from maskmoe.workflow.lock import locked, other_holders


def test_second_command_is_refused_and_names_the_first(tmp_path):
    path = tmp_path / ".lock"
    refusal = rf"another command \(process {os.getpid()}\) is at work in {tmp_path}"
    with locked(path), pytest.raises(UserError, match=refusal), locked(path):
        pytest.fail("two commands hold the lock")


def test_lock_is_free_after_the_block(tmp_path):
    path = tmp_path / ".lock"
    for _ in range(2):
        with locked(path):
            assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux finds the processes that hold a lock")
def test_processes_that_hold_the_lock_are_killed_after_their_command_has_ended(tmp_path):
    path = tmp_path / ".lock"
    with locked(path) as lock:
        holder = subprocess.Popen(["sleep", "60"], stdin=lock)
        assert holder.pid in {process.pid for process in other_holders(lock)}
        # The number of a process that has ended: the command that started the holder.
        ended = subprocess.Popen(["true"])
        ended.wait()
        path.write_text(f"{ended.pid}\n")
    assert holder.poll() is None
    with locked(path, seconds_to_end=0.1):
        assert holder.wait(10) == -9
