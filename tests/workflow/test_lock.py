"""Only one command at a time works in a folder."""

import errno
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_flock(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    path = tmp_path / ".lock"
    with locked(path):
        assert path.read_text() == f"{os.getpid()}\n"
    assert os.listdir(tmp_path) == [".lock"]
    program = "import sys; from pathlib import Path; from maskmoe.processes.folder_lock import locked_folder\n"
    program += "with locked_folder(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on host .* is writing to {tmp_path};"), locked(path):
            pytest.fail("two commands work in the folder")
        other.stdin.close()


def test_error_of_the_lock_file_is_raised(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), locked(tmp_path / ".lock"):
        pass


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
