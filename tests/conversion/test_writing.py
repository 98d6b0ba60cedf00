"""Files are verified as they are written, kept if a conversion is interrupted, and never look finished too early."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from maskmoe.conversion import writing
from maskmoe.conversion.blocks import Block, FiniteSource, MemorySource
from maskmoe.conversion.safetensors_files import plan_safetensors
from maskmoe.conversion.writing import JOURNAL, OutputFolder, write_files
from maskmoe.errors import UserError
from maskmoe.processes.folder_lock import LOCK_NAME

JOB = {"dtype": None, "source": "digest"}
TENSORS = {f"t{number}": torch.full((1000,), float(number)) for number in range(6)}


class InterruptedReadError(Exception):
    pass


class FailingSource(MemorySource):
    """Raises an exception at one tensor, and records which tensors were read."""

    def __init__(self, tensors, fails_at=None):
        super().__init__(tensors)
        self.fails_at = fails_at
        self.read_tensors = []

    def read(self, block: Block):
        if block.tensor == self.fails_at:
            raise InterruptedReadError
        self.read_tensors.append(block.tensor)
        return super().read(block)


@pytest.fixture(autouse=True)
def _one_file_at_a_time(monkeypatch):
    monkeypatch.setattr(writing, "_NUM_WRITERS", 1)


def write(folder, source, job=JOB, max_file_bytes=8000):
    """Write tensors to a folder, by default two tensors a file; return the records of the files."""
    with OutputFolder(folder, job) as output:
        write_files(source, plan_safetensors(source.tensors, max_file_bytes)[0], output)
        output.complete()
        return output.finished


def shards(folder):
    return sorted(path.name for path in folder.glob("model-*"))


def assert_whole(folder):
    loaded = {name: tensor for shard in shards(folder) for name, tensor in load_file(folder / shard).items()}
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_records_hold_size_and_digest_of_each_file(tmp_path):
    records = write(tmp_path / "new", MemorySource(TENSORS))
    assert sorted(records) == shards(tmp_path / "new") == sorted(os.listdir(tmp_path / "new"))
    for name, record in records.items():
        content = (tmp_path / "new" / name).read_bytes()
        assert (record.sha256, record.size) == (hashlib.sha256(content).hexdigest(), len(content))


def test_interrupted_conversion_resumes(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(InterruptedReadError):
        write(folder, FailingSource(TENSORS, fails_at="t3"))
    assert shards(folder) == ["model-00001-of-00003.safetensors"]
    assert sorted(os.listdir(folder)) == [*shards(folder), JOURNAL]  # no unfinished file is left
    first = (folder / shards(folder)[0]).stat()
    source = FailingSource(TENSORS)
    write(folder, source)
    assert source.read_tensors == ["t2", "t3", "t4", "t5"]
    assert (folder / shards(folder)[0]).stat().st_mtime_ns == first.st_mtime_ns
    assert not (folder / JOURNAL).exists()
    assert_whole(folder)


class MeetingSource(MemorySource):
    """Waits at each file's first tensor until the first tensors of all files are about to be read."""

    def __init__(self, tensors, num_files, fails_at=None):
        super().__init__(tensors)
        self.meeting = threading.Barrier(num_files)
        self.fails_at = fails_at

    def read(self, block: Block):
        if block.tensor in ("t0", "t2", "t4"):
            self.meeting.wait(timeout=20)
        if block.tensor == self.fails_at:
            raise InterruptedReadError
        if self.fails_at:
            time.sleep(0.2)
        return super().read(block)


def test_files_are_written_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_NUM_WRITERS", 3)
    records = write(tmp_path / "out", MeetingSource(TENSORS, num_files=3))
    assert sorted(records) == shards(tmp_path / "out")
    loaded = {
        name: tensor
        for shard in shards(tmp_path / "out")
        for name, tensor in load_file(tmp_path / "out" / shard).items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_failure_cancels_the_other_files(tmp_path, monkeypatch):
    """The first failure is raised, whichever file ends first, and no unfinished file is left."""
    monkeypatch.setattr(writing, "_NUM_WRITERS", 3)
    for tensor in ("t0", "t2", "t4"):
        with pytest.raises(InterruptedReadError):
            write(tmp_path / tensor, MeetingSource(TENSORS, num_files=3, fails_at=tensor))
        assert not (tmp_path / tensor).exists()


@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x")]
)
def test_finished_file_that_was_changed_is_written_again(tmp_path, damage):
    folder = tmp_path / "out"
    with pytest.raises(InterruptedReadError):
        write(folder, FailingSource(TENSORS, fails_at="t5"))
    damage(folder / "model-00001-of-00003.safetensors")
    source = FailingSource(TENSORS)
    write(folder, source)
    assert source.read_tensors == ["t0", "t1", "t4", "t5"]
    assert load_file(folder / "model-00001-of-00003.safetensors")["t1"].tolist() == [1.0] * 1000


def test_conversion_without_finished_files_leaves_nothing(tmp_path):
    with pytest.raises(InterruptedReadError):
        write(tmp_path / "new", FailingSource(TENSORS, fails_at="t1"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InterruptedReadError):
        write(tmp_path / "empty", FailingSource(TENSORS, fails_at="t1"))
    assert not any((tmp_path / "empty").iterdir())


def test_other_folders_are_left_alone(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(InterruptedReadError):
        write(folder, FailingSource(TENSORS, fails_at="t3"))
    with pytest.raises(UserError, match=r"unfinished conversion with other settings \(dtype\)"):
        write(folder, MemorySource(TENSORS), {"dtype": "bf16", "source": "digest"})
    with pytest.raises(UserError, match=r"other settings \(dtype, source\)"):
        write(folder, MemorySource(TENSORS), {"dtype": "bf16", "source": "another"})
    (folder / JOURNAL).write_text("{")
    with pytest.raises(UserError, match="is damaged; remove"):
        write(folder, MemorySource(TENSORS))
    write(tmp_path / "whole", MemorySource(TENSORS))
    with pytest.raises(UserError, match="whole is not empty; name a new folder"):
        write(tmp_path / "whole", MemorySource(TENSORS))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot lock .*file: File exists; choose another --save"):
        write(tmp_path / "file", MemorySource(TENSORS))


def test_names_that_are_not_utf8(tmp_path):
    """The job of an interrupted conversion may name files whose names have bytes that are not text."""
    first, second = ({"source": {os.fsdecode(b"note\xff.txt" + end): [0, 0]}} for end in (b"\xfe", b"\xfd"))
    with pytest.raises(InterruptedReadError):
        write(tmp_path / "out", FailingSource(TENSORS, fails_at="t3"), first)
    with pytest.raises(UserError, match=r"other settings \(source\)"):
        write(tmp_path / "out", MemorySource(TENSORS), second)
    write(tmp_path / "out", MemorySource(TENSORS), first)
    assert_whole(tmp_path / "out")


def test_one_conversion_at_a_time(tmp_path):
    with start_slow_conversion(tmp_path / "out") as process:
        wait_for(tmp_path / "out" / JOURNAL, process)
        expected = (
            rf"another run or conversion \(process {process.pid} on host .*\) is writing to {tmp_path}/out; [^\n]*$"
        )
        with pytest.raises(UserError, match=expected):
            write(tmp_path / "out", MemorySource(TENSORS))
        assert process.wait() == 0
    assert sorted(os.listdir(tmp_path / "out")) == [*shards(tmp_path / "out"), JOURNAL]
    write(tmp_path / "out", MemorySource(TENSORS))


def test_conversion_on_another_host_keeps_its_files(tmp_path):
    """This host sees only the heartbeat of the other host: its locks are invisible on some network file systems."""
    folder = tmp_path / "out"
    with pytest.raises(InterruptedReadError):
        write(folder, FailingSource(TENSORS, fails_at="t3"))
    (folder / ".model-00002-of-00003.safetensors.0.tmp").touch()
    (folder / LOCK_NAME).write_text(json.dumps({"host": "node7", "pid": 4711, "started": 1.0}))
    before = sorted(os.listdir(folder))
    heartbeat = threading.Timer(1.0, os.utime, [folder / LOCK_NAME])
    heartbeat.start()
    with pytest.raises(UserError, match="process 4711 on host node7"):
        write(folder, MemorySource(TENSORS))
    heartbeat.join()
    assert sorted(os.listdir(folder)) == before


def test_folder_with_the_lock_of_a_killed_conversion_is_new(tmp_path):
    (tmp_path / LOCK_NAME).touch()
    write(tmp_path, MemorySource(TENSORS))
    assert sorted(os.listdir(tmp_path)) == shards(tmp_path)


@pytest.mark.parametrize("fault", ["a byte changes", "a byte is lost"])
def test_file_that_does_not_hold_the_written_bytes(tmp_path, monkeypatch, fault):
    read_from_disk = os.pread

    def faulty(descriptor, size, position):
        content = read_from_disk(descriptor, size, position)
        return content[:-1] + (bytes(byte ^ 1 for byte in content[-1:]) if fault == "a byte changes" else b"")

    monkeypatch.setattr(writing.os, "pread", faulty)
    with pytest.raises(UserError, match="does not hold what was written to it"):
        write(tmp_path / "out", MemorySource({"t": torch.randn(5_000_000)}))
    assert not (tmp_path / "out").exists()


def test_infinite_values_are_refused(tmp_path):
    for value in (float("nan"), float("inf"), -float("inf")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            bad = torch.zeros(3000, dtype=dtype)
            bad[1234] = value
            with pytest.raises(UserError, match="bad holds NaN or infinite values; pass --allow-nan"):
                write(tmp_path / "out", FiniteSource(MemorySource({"good": torch.ones(10), "bad": bad})))
    numbers = {"ids": torch.arange(5), "big": torch.tensor([3e38, -3e38]), "none": torch.zeros(0)}
    write(tmp_path / "out", FiniteSource(MemorySource(numbers)))


def test_disk_without_room(tmp_path, monkeypatch):
    usage = shutil_usage(1000)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"out has room for 0\.00 GiB, the output needs"):
        write(tmp_path / "out", MemorySource(TENSORS))
    assert not (tmp_path / "out").exists()


def shutil_usage(free):
    return type("usage", (), {"free": free})()


def test_disk_that_fills_up(tmp_path):
    """A limit to the size of files stands in for a full disk: both errors are reported in the same way."""
    tensors = {name: torch.zeros(1000) for name in "ab"} | {"large": torch.zeros(10**6)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*-00002-.*: File too large; make room and start again"):
            write(tmp_path / "out", MemorySource(tensors), max_file_bytes=4 * 10**6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(os.listdir(tmp_path / "out")) == ["model-00001-of-00002.safetensors", JOURNAL]
    write(tmp_path / "out", MemorySource(tensors), max_file_bytes=4 * 10**6)
    assert len(shards(tmp_path / "out")) == 2


SLOW_CONVERSION = """
import sys, time, torch
from pathlib import Path
from maskmoe.conversion.safetensors_files import plan_safetensors
from maskmoe.conversion.blocks import MemorySource
from maskmoe.conversion import writing
from maskmoe.conversion.writing import OutputFolder, write_files

writing._NUM_WRITERS = 1

class SlowSource(MemorySource):
    def read(self, block):
        time.sleep(0.2)
        return super().read(block)

source = SlowSource({f"t{number}": torch.full((1000,), float(number)) for number in range(6)})
with OutputFolder(Path(sys.argv[1]), {"dtype": None, "source": "digest"}) as output:
    write_files(source, plan_safetensors(source.tensors, 8000)[0], output)
"""


def start_slow_conversion(folder):
    return subprocess.Popen([sys.executable, "-c", SLOW_CONVERSION, str(folder)], stderr=subprocess.DEVNULL)


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_conversion_resumes(tmp_path):
    folder = tmp_path / "out"
    process = start_slow_conversion(folder)
    wait_for(folder / "model-00002-of-00003.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((folder / JOURNAL).read_text())["finished"]
    source = FailingSource(TENSORS)
    write(folder, source)
    assert {"t4", "t5"} <= set(source.read_tensors) <= {"t2", "t3", "t4", "t5"}
    assert sorted(os.listdir(folder)) == shards(folder)
    assert_whole(folder)
