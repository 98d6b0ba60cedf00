"""Only one process at a time writes to a folder; the lock is free as soon as its holder is gone."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from maskmoe.errors import UserError
from maskmoe.processes.folder_lock import LOCK_NAME, locked_folder

HOLD = """
import sys
from pathlib import Path
from maskmoe.processes.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_lock(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock of a folder until its standard input is closed."""
    program = [sys.executable, "-c", HOLD, folder]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of the folder until its standard input is closed."""
    with held_lock(tmp_path) as process:
        yield process


def lock(folder: Path) -> None:
    with locked_folder(folder):
        assert f"process {os.getpid()} on host" in (folder / LOCK_NAME).read_text()


def test_second_process_is_refused_with_the_holders_host_and_pid(holder: subprocess.Popen, tmp_path: Path) -> None:
    for _ in range(2):  # a refused attempt does not free the lock
        with pytest.raises(UserError, match=f"process {holder.pid} on host {os.uname().nodename}"):
            lock(tmp_path)


def test_lock_is_free_after_its_holder_ended(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.communicate()
    assert os.listdir(tmp_path) == []
    lock(tmp_path)
    assert os.listdir(tmp_path) == []


def test_lock_is_free_after_its_holder_was_killed(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    lock(tmp_path)


def test_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    lock(tmp_path / "new" / "checkpoints")
    assert os.listdir(tmp_path) == []
    with locked_folder(tmp_path / "new" / "checkpoints"):
        (tmp_path / "new" / "checkpoints" / "file").touch()
    assert (tmp_path / "new" / "checkpoints" / "file").exists()


def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    lock(tmp_path)
    assert f"the file system of {tmp_path} has no locks" in capsys.readouterr().err


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    process = subprocess.run([sys.executable, "-c", HOLD, tmp_path], input="", text=True, timeout=20, check=False)
    assert process.returncode == 0
    os.kill(child, 9)
    os.waitpid(child, 0)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "checkpoints", tmp_path / ("x" * 5000), Path("/proc/checkpoints")):
        with pytest.raises(UserError, match="cannot lock"):
            lock(folder)


def test_no_file_outside_the_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="cannot lock"):
        lock(tmp_path)
    assert not (tmp_path / "file").exists()
