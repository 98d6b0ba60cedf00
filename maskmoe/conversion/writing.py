"""Writes files of tensors block by block, verifies every write, and resumes conversions that were interrupted."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Buffer, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from pydantic import BaseModel
from tqdm import tqdm

from maskmoe.checkpoint.integrity import FileRecord
from maskmoe.cli import atomic_output
from maskmoe.conversion.blocks import Block, TensorSource
from maskmoe.conversion.stored_tensors import byte_view
from maskmoe.errors import UserError

BLOCK_BYTES = 16 << 20
"""Upper bound of a block's size when tensors are read or written block by block."""

# If single writes are larger, the kernel must find contiguous memory as large, which takes several times as long.
_PIECE_BYTES = 256 << 10

JOURNAL = "unfinished_conversion.json"
"""Name of the file that marks a folder as unfinished and lists its finished files."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Segment:
    """A part of a file: the bytes `head`, then the elements of `block` if it is given, then the bytes `tail`."""

    head: bytes = b""
    block: Block | None = None
    tail: bytes = b""


@dataclass(frozen=True)
class PlannedFile:
    """A file that is yet to be written.

    Attributes:
        name: path of the file inside the output folder.
        segments: the file's content, in order.
        size: size of the file in bytes.
    """

    name: str
    segments: Sequence[Segment]
    size: int


class _Journal(BaseModel):
    """Content of the journal: what the conversion does, and which files it has finished."""

    job: dict[str, Any]
    finished: dict[str, FileRecord]


class OutputFolder:
    """A folder that a conversion fills; a journal in the folder marks it as unfinished until `complete` is called.

    The folder must be new or empty, or hold the finished files of the same conversion, which was interrupted. Use the
    object as a context manager: it locks the folder against other conversions, and removes its content on leaving if
    no file was finished.

    Args:
        path: the folder.
        job: describes the conversion by JSON values. A conversion resumes only a folder with an equal description.
        check: a function that raises an exception if the result must not be completed. It runs while files are
            written.

    Attributes:
        path: the folder.
        check: the function `check`.
        finished: records of the finished files by name.

    Raises:
        UserError: on entering: the folder holds something else or another conversion's files, another process is
            writing to it, or it cannot be created.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], check: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.check = check
        self.finished: dict[str, FileRecord] = {}
        self._job = json.loads(json.dumps(job))  # as the journal gives it back
        self._journal = path / JOURNAL
        self._journal_lock = Lock()

    def __enter__(self) -> Self:
        self._is_new = not self.path.exists()
        self._descriptor = self._make_and_lock()
        try:
            if any(self.path.iterdir()):
                self._resume()
            self._save()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._descriptor)
        if self._journal.exists() and not self.finished:
            for path in self.path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if self._is_new:
                self.path.rmdir()

    def record(self, name: str, record: FileRecord) -> None:
        """Add a finished file to the journal; can be called on any thread."""
        with self._journal_lock:
            self.finished[name] = record
            self._save()

    def complete(self) -> None:
        """Remove the journal: the folder is finished."""
        self._journal.unlink()

    def _make_and_lock(self) -> int:
        """Create the folder if it does not exist, and lock it; return the descriptor that holds the lock."""
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
        """Read which files an interrupted conversion has finished; refuse a folder of another conversion."""
        try:
            journal = _Journal.model_validate_json(self._journal.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{self.path} is not empty; name a new folder") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{self._journal} is damaged; remove {self.path} or name another folder") from error
        job = journal.job
        if job != self._job:
            changed = ", ".join(sorted(key for key in job | self._job if job.get(key) != self._job.get(key)))
            raise UserError(
                f"{self.path} holds an unfinished conversion with other settings ({changed}); start that "
                "conversion again, remove the folder or name another folder"
            )
        self.finished = journal.finished

    def _save(self) -> None:
        """Write the journal."""
        journal = _Journal(job=self._job, finished=self.finished)
        with reporting_full_disk(self._journal), atomic_output(self._journal) as path:
            path.write_text(journal.model_dump_json(indent=2))


def write_files(source: TensorSource, files: Sequence[PlannedFile], output: OutputFolder) -> None:
    """Write files, several at a time, except intact files of an interrupted conversion.

    A file gets its name only when it is complete and on the disk. `output.check` has passed when this function returns.

    Args:
        source: provides the blocks; several threads read it.
        files: the files to write.
        output: the folder for the files.

    Raises:
        UserError: the disk is full, a block cannot be read, a file does not hold what was written to it, or
            `output.check` raises it.
    """
    # Skip files that an interrupted conversion has finished.
    found = tqdm(files, desc="checking finished files", unit="file", delay=0.5, disable=not output.finished)
    done = {file.name: file.size for file in found if _is_done(output, file)}
    total, initial = sum(file.size for file in files), sum(done.values())
    _check_space(output.path, total - initial)
    # Write the remaining files; the first failure stops all of them.
    bar = tqdm(total=total, initial=initial, desc="converting", unit="B", unit_scale=True, unit_divisor=1024)
    writer = _FileWriter(source, output, bar)
    with bar, ThreadPoolExecutor(1) as checker, ThreadPoolExecutor(_num_writers()) as writers:
        try:
            work = [checker.submit(output.check)]
            work += [writers.submit(writer.write, file) for file in files if file.name not in done]
            for future in as_completed(work):
                with suppress(CancelledError):  # cancelled by a failure, which another future raises
                    future.result()
        except BaseException:
            writer.stop()
            raise


def _num_writers() -> int:
    """Return the number of files to write at a time.

    One more than there are cores, since one writer waits for the disk; at most 8, to bound the memory for blocks.
    """
    return min(8, len(os.sched_getaffinity(0)) + 1)


@contextmanager
def reporting_full_disk(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside the context into a `UserError` that names the file `path` and the reason.

    Raises:
        UserError: an `OSError` was raised inside the context.
    """
    try:
        yield
    except OSError as error:
        hint = "; make room and start again: finished files are kept" if error.errno in _NO_SPACE else ""
        raise UserError(f"cannot write {path}: {error.strerror}{hint}") from error


def _is_done(output: OutputFolder, file: PlannedFile) -> bool:
    """Return whether an interrupted conversion finished a file and the file has not changed since."""
    record, path = output.finished.get(file.name), output.path / file.name
    return record is not None and record.size == file.size and path.is_file() and FileRecord.of(path) == record


def _check_space(folder: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes.

    Raises:
        UserError: the disk is too full.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder} has room for {free / 2**30:.2f} GiB, the output needs {needed / 2**30:.2f} GiB")


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


class _FileWriter:
    """Writes files piece by piece and reads each piece back; a file's digest is computed from the bytes read back.

    Args:
        source: provides the blocks.
        output: the folder for the files.
        bar: the progress bar, in bytes.
    """

    def __init__(self, source: TensorSource, output: OutputFolder, bar: tqdm) -> None:
        self._source = source
        self._output = output
        self._bar = bar
        self._is_stopped = False

    def stop(self) -> None:
        """Cancel the files that are being written, and all later ones."""
        self._is_stopped = True

    def write(self, file: PlannedFile) -> None:
        """Write one file and record it as finished; can be called on any thread.

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
        """Write a file's content to a descriptor; return the record of the file."""
        digest, size = hashlib.sha256(), 0
        for content in self._contents(file):
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

    def _contents(self, file: PlannedFile) -> Iterator[memoryview]:
        """Yield the file's content in order, without empty parts."""
        for segment in file.segments:
            if segment.head:
                yield memoryview(segment.head)
            if segment.block is not None:
                yield byte_view(self._source.read(segment.block).contiguous())
            if segment.tail:
                yield memoryview(segment.tail)


def _write_and_read_back(descriptor: int, content: memoryview, end: int, digest: Callable[[Buffer], None]) -> bool:
    """Append to a file piece by piece and read each piece back.

    Pieces are small enough to stay in the processor's cache until they have been compared and digested.

    Args:
        descriptor: the file, opened for reading and writing, at its end.
        content: the bytes to append.
        end: position of the file's end.
        digest: is called with the bytes that were read back.

    Returns:
        whether the bytes read back equal `content`.
    """
    buffer = np.empty(min(_PIECE_BYTES, len(content)), np.uint8)
    for start in range(0, len(content), _PIECE_BYTES):
        piece = content[start : start + _PIECE_BYTES]
        unwritten = piece
        while unwritten:
            unwritten = unwritten[os.write(descriptor, unwritten) :]
        read_back = buffer[: len(piece)]
        os.preadv(descriptor, [read_back], end + start)
        if not _are_equal(read_back, np.frombuffer(piece, np.uint8)):
            return False
        digest(read_back)
    return True


def _are_equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two arrays, uint8 [bytes], are equal; compares eight bytes at a time, which is faster."""
    aligned = len(first) // 8 * 8
    first_words, second_words = (array[:aligned].view(np.uint64) for array in (first, second))
    return np.array_equal(first_words, second_words) and np.array_equal(first[aligned:], second[aligned:])
