"""Only one training run at a time writes to a folder; the lock is free as soon as its holder is gone."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from support.system import HOLD, held_lock

from maskmoe.errors import UserError
from maskmoe.processes import folder_lock, lifetimes
from maskmoe.processes.folder_lock import LOCK_NAME, check_unlocked, locked_folder
from maskmoe.processes.lifetimes import Holder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock of the folder until its standard input is closed."""
    with held_lock(tmp_path) as process:
        yield process


def lock(folder: Path) -> None:
    with locked_folder(folder):
        assert json.loads((folder / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_second_run_is_refused_with_the_holders_host_and_pid(holder: subprocess.Popen, tmp_path: Path) -> None:
    """A look does not free or take the lock."""
    for look_or_lock in (check_unlocked, check_unlocked, lock, check_unlocked):
        with pytest.raises(UserError, match=f"process {holder.pid} on host {os.uname().nodename}"):
            look_or_lock(tmp_path)


def test_lock_is_free_after_its_holder_ended(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.communicate()
    assert os.listdir(tmp_path) == []
    lock(tmp_path)
    assert os.listdir(tmp_path) == []


def test_lock_is_free_after_its_holder_was_killed(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_NAME).exists()
    check_unlocked(tmp_path)
    start = time.monotonic()
    lock(tmp_path)
    assert time.monotonic() - start < 5


def leave_lock_of(folder: Path, host: str, pid: int = 4711, started: float = 1.0, **others: str) -> None:
    (folder / LOCK_NAME).write_text(json.dumps({"host": host, "pid": pid, "started": started, **others}))


def test_lock_of_another_host_without_heartbeat_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_STALE_SECONDS", 1.0)
    leave_lock_of(tmp_path, "node7")
    lock(tmp_path)


def test_lock_of_another_host_with_heartbeat_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other host's lock is not visible here, as on a file system whose locks are local.
    leave_lock_of(tmp_path, "node7")
    timer = threading.Timer(1.0, os.utime, [tmp_path / LOCK_NAME])
    timer.start()
    with pytest.raises(UserError, match="process 4711 on host node7"):
        lock(tmp_path)
    timer.join()


@pytest.mark.parametrize("others", [{}, {"pid_namespace": "another machine"}], ids=["unknown", "known"])
@pytest.mark.parametrize("touches", [True, False])
def test_lock_of_another_host_with_the_name_of_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: dict[str, str], touches: bool
) -> None:
    monkeypatch.setattr(folder_lock, "_STALE_SECONDS", 3.0)
    monkeypatch.setattr(folder_lock, "_try_lock", lambda _: None)
    leave_lock_of(tmp_path, os.uname().nodename, **others)
    if touches:
        timer = threading.Timer(1.0, os.utime, [tmp_path / LOCK_NAME])
        timer.start()
        with pytest.raises(UserError, match="process 4711 on host"):
            lock(tmp_path)
        timer.join()
    else:
        lock(tmp_path)


def test_host_name_alone_tells_hosts_apart_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Holder(os.uname().nodename, 4711, 1.0)
    assert not holder.is_here
    monkeypatch.setattr(lifetimes, "_BOOT_ID", Path("/proc/missing"))
    assert holder.is_here
    assert Holder.this_process().is_here


def test_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "_TOUCH_SECONDS", 0.05)
    with locked_folder(tmp_path):
        before = (tmp_path / LOCK_NAME).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / LOCK_NAME).stat().st_mtime_ns > before


@pytest.mark.parametrize("is_alive", [True, False])
def test_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alive: bool) -> None:
    monkeypatch.setattr(folder_lock, "_try_lock", lambda _: None)
    parent = psutil.Process(os.getppid())
    started = parent.create_time() if is_alive else 1.0
    namespace = Holder.this_process().pid_namespace
    leave_lock_of(tmp_path, os.uname().nodename, parent.pid, started, pid_namespace=namespace)
    if is_alive:
        with pytest.raises(UserError, match=f"process {parent.pid} on host"):
            lock(tmp_path)
    else:
        lock(tmp_path)  # another process has the id of a holder that ended


@pytest.mark.parametrize("content", ["", "{}", "[" * 5000, '{"host": 1, "pid": "x", "started": null}', "\0\xff"])
def test_damaged_lock_file_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_NAME).write_text(content)
    lock(tmp_path)


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
        check_unlocked(folder)


def test_no_file_outside_the_folder_is_written(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="cannot lock"):
        lock(tmp_path)
    assert not (tmp_path / "file").exists()
