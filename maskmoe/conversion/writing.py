"""Writes files of tensors block by block, verifies every write, and resumes conversions that were interrupted."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Self

import torch
from pydantic import BaseModel
from tqdm import tqdm

from maskmoe.checkpoint.integrity import FileRecord
from maskmoe.conversion.blocks import Block, TensorSource
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.surrogates import printable_texts
from maskmoe.files.untrusted import UnusableFile, read_json_bytes
from maskmoe.processes.folder_lock import LOCK_NAME, locked_folder

BLOCK_BYTES = 16 << 20
"""Upper bound of a block's size when tensors are read or written block by block."""

# If single writes are larger, the kernel must find contiguous memory as large, which takes several times as long.
_PIECE_BYTES = 256 << 10

JOURNAL = "unfinished_conversion.json"
"""Name of the file that marks a folder as unfinished and lists its finished files."""

# One more than there are cores, since one writer waits for the disk; at most 8, to bound the memory for blocks.
_NUM_WRITERS = min(8, len(os.sched_getaffinity(0)) + 1)

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class PlannedFile:
    """A file that is yet to be written.

    Attributes:
        name: path of the file inside the output folder.
        parts: the file's content in order: bytes, and blocks of tensors, whose elements are written in row-major order.
        size: size of the file in bytes.
    """

    name: str
    parts: list[bytes | Block]
    size: int


class _Journal(BaseModel):
    """Content of the journal: what the conversion does, and which files it has finished."""

    job: dict[str, Any]
    finished: dict[str, FileRecord]


class OutputFolder:
    """A folder that a conversion fills; a journal in the folder marks it as unfinished until `complete` is called.

    The folder must be new or empty, or hold the finished files of the same conversion, which was interrupted. Use the
    object as a context manager: it locks the folder against other processes, and removes its content on leaving if no
    file was finished.

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
        self._job = printable_texts(job)  # equals what the journal holds; names of files may not be valid UTF-8
        self._journal = path / JOURNAL
        self._journal_lock = Lock()
        self._session = self._fill()

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._session.__exit__(*exception)

    @contextmanager
    def _fill(self) -> Iterator[None]:
        """Lock the folder and keep its journal during the block; then remove what is of no use to a later start."""
        is_new = not self.path.exists()
        try:
            with locked_folder(self.path):
                if self._content():
                    self._resume()
                self._save()
                try:
                    yield
                finally:
                    if self._journal.exists() and not self.finished:
                        for path in self._content():
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
        finally:
            if is_new:
                with suppress(OSError):  # the folder has content, or another conversion has locked it meanwhile
                    self.path.rmdir()

    def _content(self) -> list[Path]:
        """Return what is in the folder besides the lock file."""
        return [path for path in self.path.iterdir() if path.name != LOCK_NAME]

    def record(self, name: str, record: FileRecord) -> None:
        """Add a finished file to the journal; can be called on any thread."""
        with self._journal_lock:
            self.finished[name] = record
            self._save()

    def complete(self) -> None:
        """Remove the journal: the folder is finished."""
        self._journal.unlink()

    def _resume(self) -> None:
        """Read which files an interrupted conversion has finished; refuse a folder of another conversion."""
        try:
            journal = _Journal.model_validate_json(read_json_bytes(self._journal))
        except (UnusableFile, ValueError) as error:
            if not os.path.lexists(self._journal):
                raise UserError(f"{self.path} is not empty; name a new folder") from error
            raise UserError(f"{self._journal} is damaged; remove {self.path} or name another folder") from error
        job = journal.job
        if changed := sorted(key for key in job | self._job if job.get(key) != self._job.get(key)):
            raise UserError(
                f"{self.path} holds an unfinished conversion with other settings ({', '.join(changed)}); start that "
                "conversion again, remove the folder or name another folder"
            )
        self.finished = journal.finished
        for leftover in self.path.rglob(".*.tmp"):  # of files that `atomic_output` was writing when it was killed
            leftover.unlink()

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
    free, needed = shutil.disk_usage(output.path).free, total - initial
    if free < needed:
        raise UserError(f"{output.path} has room for {free / 2**30:.2f} GiB, the output needs {needed / 2**30:.2f} GiB")
    # Write the remaining files; the first failure stops all of them.
    bar = tqdm(total=total, initial=initial, desc="converting", unit="B", unit_scale=True, unit_divisor=1024)
    is_stopped = Event()
    with bar, ThreadPoolExecutor(_NUM_WRITERS) as writers:
        try:
            work = [writers.submit(output.check)]
            work += [
                writers.submit(_write_file, source, file, output, bar, is_stopped)
                for file in files
                if file.name not in done
            ]
            for future in as_completed(work):
                with suppress(CancelledError):  # cancelled by a failure, which another future raises
                    future.result()
        except BaseException:
            is_stopped.set()
            raise


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


def _write_file(source: TensorSource, file: PlannedFile, output: OutputFolder, bar: tqdm, is_stopped: Event) -> None:
    """Write one file piece by piece, read each piece back, and record the file as finished; can run on any thread.

    Args:
        source: provides the blocks.
        file: the file.
        output: the folder for the file.
        bar: the progress bar, in bytes.
        is_stopped: stops all files once it is set; this function sets it if it fails.

    Raises:
        UserError: see `write_files`.
        CancelledError: `is_stopped` was set.
    """
    path = output.path / file.name
    path.parent.mkdir(exist_ok=True)
    try:
        with reporting_full_disk(path), atomic_output(path) as partial, open(partial, "wb+") as stream:
            digest, size = hashlib.sha256(), 0
            for piece in _pieces(source, file):
                if is_stopped.is_set():
                    raise CancelledError
                stream.write(piece)
                stream.flush()
                read_back = os.pread(stream.fileno(), len(piece), size)
                if read_back != piece:
                    raise UserError(f"{path} does not hold what was written to it; the disk or the memory is faulty")
                digest.update(read_back)
                size += len(piece)
                bar.update(len(piece))
            if size != file.size:
                raise RuntimeError(f"{file.name} has {size} bytes, not {file.size} as planned")
            os.fsync(stream.fileno())
    except BaseException:
        is_stopped.set()
        raise
    output.record(file.name, FileRecord(digest.hexdigest(), size))


def _pieces(source: TensorSource, file: PlannedFile) -> Iterator[bytes]:
    """Yield the file's content in order, in pieces that stay in the processor's cache until they are digested."""
    for part in file.parts:
        if isinstance(part, Block):
            part = memoryview(source.read(part).contiguous().view(-1).view(torch.uint8).numpy())
        for start in range(0, len(part), _PIECE_BYTES):
            yield bytes(part[start : start + _PIECE_BYTES])
