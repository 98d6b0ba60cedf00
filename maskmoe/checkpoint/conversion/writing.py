"""Files of tensors, written block by block, verified as they are written, and kept when the work is interrupted."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Buffer, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from maskmoe.checkpoint.conversion.blocks import Block, TensorSource
from maskmoe.checkpoint.conversion.stored_tensors import byte_view
from maskmoe.checkpoint.integrity import FileRecord
from maskmoe.cli import atomic_output
from maskmoe.errors import UserError

BLOCK_BYTES = 16 << 20
"""What is read, written and verified at a time."""

# Larger writes take several times as long where the kernel must find as large a piece of memory for them.
_WRITE_BYTES = 256 << 10

# Below, a file is left to the kernel until it is whole.
_FLUSH_BYTES = 256 << 20

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
        """Note that a file is done."""
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
    """Write files, but for those of an interrupted conversion that are intact.

    A file has its name only when it is whole. At the end, all are on the disk, and the output's check has passed.

    Args:
        source: of the blocks.
        files: what to write.
        output: gets them.

    Raises:
        UserError: the disk is full, a block cannot be read, or what was written cannot be read back; or what the check
            raises.
    """
    found = tqdm(files, desc="checking what is done", unit="file", delay=0.5, disable=not output.finished)
    done = {file.name: file.size for file in found if _is_done(output, file)}
    left = [file for file in files if file.name not in done]
    total, initial = sum(file.size for file in files), sum(done.values())
    _check_space(output.path, total - initial)
    bar = tqdm(total=total, initial=initial, desc="converting", unit="B", unit_scale=True, unit_divisor=1024)
    with bar, ThreadPoolExecutor(2) as executor:
        check = executor.submit(output.check)
        flushes = [executor.submit(_flush, output.path / name) for name in done]
        for file in left:
            if check.done():
                check.result()
            path = output.path / file.name
            path.parent.mkdir(exist_ok=True)
            with reporting_full_disk(path), _partial(path) as partial:
                record = _write_file(source, file, partial, bar)
            output.record(file.name, record)
            flushes.append(executor.submit(_flush, path))
        for future in (*flushes, check):
            future.result()


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


def _flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with reporting_full_disk(path), open(path, "rb") as stream:
        os.fsync(stream.fileno())


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


def _write_file(source: TensorSource, file: PlannedFile, path: Path, bar: tqdm) -> FileRecord:
    """Write a file block by block and read each back; its digest is that of what was read.

    Reading the source, writing, hashing, and bringing it to the disk are done at the same time, each on a thread of its
    own.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb+", buffering=0) as stream, ThreadPoolExecutor(2) as executor:
        hashing: Future[None] | None = None
        flush: Future[None] | None = None
        for buffer in _ahead(_content(source, file)):
            written = _write_and_read_back(stream.fileno(), np.frombuffer(buffer, np.uint8), size)
            if written is None:
                raise UserError(f"{path} does not hold what was written to it; the disk or the memory is faulty")
            if hashing is not None:
                hashing.result()
            hashing = executor.submit(digest.update, written)
            size += len(written)
            bar.update(len(written))
            if size >= _FLUSH_BYTES and (flush is None or flush.done()):
                flush = executor.submit(os.fdatasync, stream.fileno())
    if size != file.size:
        raise RuntimeError(f"{file.name} has {size} bytes, not {file.size} as planned")
    return FileRecord(digest.hexdigest(), size)


def _content(source: TensorSource, file: PlannedFile) -> Iterator[Buffer]:
    """What is not empty of a file, in order."""
    for segment in file.segments:
        if segment.head:
            yield segment.head
        if segment.block is not None:
            yield byte_view(source.read(segment.block).contiguous())
        if segment.tail:
            yield segment.tail


def _ahead[Item](items: Iterable[Item]) -> Iterator[Item]:
    """The same items, each made while the one before is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as executor:
        upcoming = executor.submit(next, iterator, end)
        while (item := upcoming.result()) is not end:
            upcoming = executor.submit(next, iterator, end)
            yield item


def _write_and_read_back(descriptor: int, content: np.ndarray, position: int) -> np.ndarray | None:
    """Append uint8 [bytes] to a file, which ends at `position`; what it holds there, or None if it is not the same."""
    found = np.empty_like(content)
    for start in range(0, len(content), _WRITE_BYTES):
        piece = slice(start, start + _WRITE_BYTES)
        left = memoryview(content[piece])
        while left:
            left = left[os.write(descriptor, left) :]
        os.preadv(descriptor, [found[piece]], position + start)
        if not _are_equal(found[piece], content[piece]):
            return None
    return found


def _are_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays, uint8 [bytes], are equal; eight bytes at a time, which is faster by as much."""
    whole = len(first) // 8 * 8
    words = (array[:whole].view(np.uint64) for array in (first, second))
    return np.array_equal(*words) and np.array_equal(first[whole:], second[whole:])
