"""Files of tensors, written block by block, verified as they are written, and kept when the work is interrupted."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Buffer, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from tqdm import tqdm

from maskmoe.checkpoint.integrity import FileRecord
from maskmoe.cli import atomic_output
from maskmoe.conversion.blocks import Block, TensorSource
from maskmoe.conversion.stored_tensors import byte_view
from maskmoe.errors import UserError

BLOCK_BYTES = 16 << 20
"""What is read at a time."""

# Larger writes take several times as long where the kernel must find as large a piece of memory for them.
_PIECE_BYTES = 256 << 10

JOURNAL = "unfinished_conversion.json"
"""What of an unfinished output is done. The name says what the folder is."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Segment:
    """A part of a file: `head`, then the elements of a block if there is one, then `tail`."""

    head: bytes = b""
    block: Block | None = None
    tail: bytes = b""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write.

    Attributes:
        name: in the output's folder.
        segments: its content, in order.
        size: bytes.
    """

    name: str
    segments: Sequence[Segment]
    size: int


class OutputFolder:
    """A folder that a conversion fills, and that says so until it is whole.

    It is new or empty, or was left by a conversion of the same kind that was interrupted. To be used as a context
    manager, which keeps others from writing to it; if no file was finished at the end, nothing is left of it.

    Args:
        path: the folder.
        job: what is done, as JSON values. Another one does not go on with what this one left.
        check: something that must not raise if the folder is to become whole. It runs while files are written.

    Attributes:
        path: the folder.
        check: see above.
        finished: the files that are done, by name.

    Raises:
        UserError: on entering: the folder holds something else, is another job's, is being written to, or cannot be
            made.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], check: Callable[[], None] = lambda: None):
        self.path = path
        self.check = check
        self.finished: dict[str, FileRecord] = {}
        self._job = job
        self._journal = path / JOURNAL
        self._recording = Lock()

    def __enter__(self) -> "OutputFolder":
        self._is_new = not self.path.exists()
        self._lock = self._make_and_lock()
        try:
            if any(self.path.iterdir()):
                self._resume()
            self._save()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._lock)
        if self._journal.exists() and not self.finished:
            for path in self.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self._is_new:
                self.path.rmdir()

    def record(self, name: str, record: FileRecord) -> None:
        """Note that a file is done; from any thread."""
        with self._recording:
            self.finished[name] = record
            self._save()

    def complete(self) -> None:
        """Say no longer that the folder is unfinished."""
        self._journal.unlink()

    def _make_and_lock(self) -> int:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise UserError(f"another conversion is writing to {self.path}") from error
        return descriptor

    def _resume(self) -> None:
        try:
            left = json.loads(self._journal.read_bytes())
            job = left["job"]
            finished = {name: FileRecord(**record) for name, record in left["finished"].items()}
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not empty; name a new folder") from error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{self._journal} is damaged; remove {self.path} or name another folder") from error
        if job != json.loads(json.dumps(self._job)):
            changed = ", ".join(sorted(key for key in job | self._job if job.get(key) != self._job.get(key)))
            raise UserError(
                f"{self.path} holds an unfinished conversion with other settings ({changed}); start that one again, "
                "remove the folder or name another one"
            )
        self.finished = finished

    def _save(self) -> None:
        finished = {name: asdict(record) for name, record in self.finished.items()}
        with reporting_full_disk(self._journal), atomic_output(self._journal) as path:
            path.write_text(json.dumps({"job": self._job, "finished": finished}, indent=2))


def write_files(source: TensorSource, files: Sequence[PlannedFile], output: OutputFolder) -> None:
    """Write files, but for those of an interrupted conversion that are intact; several at a time.

    A file has its name only when it is whole and on the disk. At the end, the output's check has passed.

    Args:
        source: of the blocks; several threads read it.
        files: what to write.
        output: gets them.

    Raises:
        UserError: the disk is full, a block cannot be read, or what was written cannot be read back; or what the check
            raises.
    """
    found = tqdm(files, desc="checking what is done", unit="file", delay=0.5, disable=not output.finished)
    done = {file.name: file.size for file in found if _is_done(output, file)}
    total, initial = sum(file.size for file in files), sum(done.values())
    _check_space(output.path, total - initial)
    bar = tqdm(total=total, initial=initial, desc="converting", unit="B", unit_scale=True, unit_divisor=1024)
    writer = _FileWriter(source, output, bar)
    with bar, ThreadPoolExecutor(1) as checker, ThreadPoolExecutor(_num_writers()) as writers:
        try:
            work = [checker.submit(output.check)]
            work += [writers.submit(writer.write, file) for file in files if file.name not in done]
            for future in as_completed(work):
                with suppress(CancelledError):  # something else has failed, which will come, too
                    future.result()
        except BaseException:
            writer.stop()
            raise


def _num_writers() -> int:
    """One more than there are cores, since one waits for the disk; few enough for their blocks in memory."""
    return min(8, len(os.sched_getaffinity(0)) + 1)


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Report what cannot be written as bad input.

    Raises:
        UserError: naming the file and the reason.
    """
    try:
        yield
    except OSError as error:
        hint = "; make room and start again: finished files are kept" if error.errno in _NO_SPACE else ""
        raise UserError(f"cannot write {path}: {error.strerror}{hint}") from error


def _is_done(output: OutputFolder, file: PlannedFile) -> bool:
    """Whether an interrupted conversion finished a file, and it still is as it was."""
    record, path = output.finished.get(file.name), output.path / file.name
    return record is not None and record.size == file.size and path.is_file() and FileRecord.of(path) == record


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has room for {free / 2**30:.2f} GiB, the output needs {needed / 2**30:.2f} GiB")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A name to write under until the file is whole; the rests of one that will not be are removed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _FileWriter:
    """Writes files piece by piece and reads each piece back; a file's digest is that of what was read.

    Args:
        source: of the blocks.
        output: gets the files.
        bar: shows the bytes that are done.
    """

    def __init__(self, source: TensorSource, output: OutputFolder, bar: tqdm):
        self._source = source
        self._output = output
        self._bar = bar
        self._is_stopped = False

    def stop(self) -> None:
        """Give up what is being written, and write no more."""
        self._is_stopped = True

    def write(self, file: PlannedFile) -> None:
        """Write one file, on any thread.

        Raises:
            UserError: see `write_files`.
            CancelledError: `stop` was called, or another file has failed.
        """
        path = self._output.path / file.name
        path.parent.mkdir(exist_ok=True)
        try:
            with reporting_full_disk(path), _partial(path) as partial, open(partial, "wb+", buffering=0) as stream:
                record = self._write_to(stream.fileno(), file, path)
        except BaseException:
            self.stop()
            raise
        self._output.record(file.name, record)

    def _write_to(self, descriptor: int, file: PlannedFile, path: Path) -> FileRecord:
        digest, size = hashlib.sha256(), 0
        for content in self._content_of(file):
            if self._is_stopped:
                raise CancelledError
            if not _write_and_read_back(descriptor, content, size, digest.update):
                raise UserError(f"{path} does not hold what was written to it; the disk or the memory is faulty")
            size += len(content)
            self._bar.update(len(content))
        if size != file.size:
            raise RuntimeError(f"{file.name} has {size} bytes, not {file.size} as planned")
        os.fsync(descriptor)
        return FileRecord(digest.hexdigest(), size)

    def _content_of(self, file: PlannedFile) -> Iterator[memoryview]:
        """What is not empty of a file, in order."""
        for segment in file.segments:
            if segment.head:
                yield memoryview(segment.head)
            if segment.block is not None:
                yield byte_view(self._source.read(segment.block).contiguous())
            if segment.tail:
                yield memoryview(segment.tail)


def _write_and_read_back(descriptor: int, content: memoryview, position: int, take: Callable[[Buffer], None]) -> bool:
    """Append to a file, which ends at `position`; `take` gets what it then holds. Returns whether that is the same.

    Pieces are small enough to stay in the processor's cache until they are done with.
    """
    found = np.empty(min(_PIECE_BYTES, len(content)), np.uint8)
    for start in range(0, len(content), _PIECE_BYTES):
        piece = content[start : start + _PIECE_BYTES]
        left = piece
        while left:
            left = left[os.write(descriptor, left) :]
        read = found[: len(piece)]
        os.preadv(descriptor, [read], position + start)
        if not _are_equal(read, np.frombuffer(piece, np.uint8)):
            return False
        take(read)
    return True


def _are_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays, uint8 [bytes], are equal; eight bytes at a time, which is faster by as much."""
    whole = len(first) // 8 * 8
    words = (array[:whole].view(np.uint64) for array in (first, second))
    return np.array_equal(*words) and np.array_equal(first[whole:], second[whole:])
