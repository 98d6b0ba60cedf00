"""Opens the files that a command writes: no input is overwritten, and no incomplete file is left behind."""

import os
import signal
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from maskmoe.errors import UserError, refused_by_system
from maskmoe.processes.interruption import handling_signals

_CURE = "choose an existing, writable folder"
_NAME_CHARACTERS = 40  # of an output's name in the name of its temporary file, since file systems limit names


def check_outputs(
    outputs: Iterable[str | os.PathLike[str]], inputs: Iterable[str | os.PathLike[str]] = (), force: bool = False
) -> None:
    """Check that the files may be written; call this function before the work starts.

    Paths that lead to one file by links, or by other spellings, count as the same file. A file in an input folder is an
    input, too. `force` permits outputs to replace existing files, but never inputs.

    Raises:
        UserError: An output is an input, two outputs are the same file, an output exists and `force` is false, or an
            output is not a regular file or belongs to a checkpoint, or its folder does not exist or is not writable.
    """
    outputs, inputs = [Path(path) for path in outputs], [Path(path) for path in inputs]
    for number, path in enumerate(outputs):
        for other in outputs[:number]:
            if _is_same_file(path, other):
                raise UserError(f"two outputs have the same name {path}; name two files")
        for source in inputs:
            if _is_same_file(path, source):
                raise UserError(f"cannot write {path}: it is an input of this command; name another file")
            if os.path.lexists(path) and os.path.isdir(source) and lies_inside(path, source):
                raise UserError(f"cannot write {path}: it belongs to the input {source}; name a file elsewhere")
        check_output_kind(path)
        refuse_checkpoint(path)
        if os.path.lexists(path) and not force:
            raise UserError(f"cannot write {path}: it exists; name another file, or give --force to replace it")
        check_output_folder(path.parent, path)


def check_output_kind(path: Path) -> None:
    """Check that a path is free, or leads to a regular file, which can be replaced. Raises UserError."""
    with refused_by_system(f"cannot write {path}", _CURE):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            return
    if stat.S_ISDIR(mode):
        raise UserError(f"cannot write {path}: it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"cannot write {path}: it is not a regular file; name a file")


def refuse_checkpoint(path: Path) -> None:
    """Refuse an output in the folder of a checkpoint of Megatron, which must stay as it was saved. Raises UserError."""
    path = Path(os.path.realpath(path))
    for folder in (path, *path.parents):
        if os.path.isfile(folder / ".metadata"):  # Eclipse has a folder of this name
            raise UserError(
                f"cannot write {path}: {folder} is a checkpoint, which stays as it was saved; write elsewhere"
            )


def check_output_folder(folder: Path, path: Path) -> None:
    """Check that files can be made in a folder; raise a UserError that names the output `path` otherwise."""
    with refused_by_system(f"cannot write {path}", _CURE), tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def atomic_output(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Readers see the old file or the complete new file. The file has the permissions that the umask gives to new files.
    SIGTERM and SIGHUP count as failures, see `unwinding_on_signals`.

    Raises:
        UserError: `path` is a folder or a device, or the folder of `path` does not exist or is not writable.
    """
    path = Path(path)
    check_output_kind(path)
    temporary = path.with_name(f".{path.name[:_NAME_CHARACTERS]}.{uuid.uuid4().hex[:8]}.tmp")
    with unwinding_on_signals():
        with refused_by_system(f"cannot write {path}", _CURE):
            temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        try:
            yield temporary
            temporary.chmod(mode)  # safetensors replaces the file by a file that only its owner may read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, which replaces an older file atomically. Raises UserError, see `atomic_output`."""
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit(128 + number)` in the block, so that its context managers clean up.

    Signals that are ignored or have a handler keep their handling. Outside the main thread nothing changes, because
    Python handles signals on the main thread only.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    with handling_signals([each for each in numbers if signal.getsignal(each) is signal.SIG_DFL], _exit_once):
        yield


def _exit_once(number: int, _frame: FrameType | None) -> None:
    """Raise `SystemExit`, and ignore further signals, which would interrupt the context managers that clean up."""
    for other in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(other) is _exit_once:
            signal.signal(other, _ignore)
    raise SystemExit(128 + number)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing. Unlike `signal.SIG_IGN`, this handler is not inherited by processes that the cleaning up starts."""


def _is_same_file(path: Path, other: Path) -> bool:
    """Return whether two paths lead to one file, which need not exist."""
    if os.path.realpath(path) == os.path.realpath(other):
        return True
    with suppress(OSError):
        return os.path.samefile(path, other)
    return False


def lies_inside(path: Path, folder: Path) -> bool:
    """Return whether a path, which need not exist, is a folder or lies inside the folder, also by links."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def render_template(package: str, name: str, values: Mapping[str, Any], filters: Mapping[str, Callable]) -> str:
    """Return the text of a file in a package's folder `templates`, in which a missing variable is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # most commands render nothing

    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=name.endswith(".html.j2"),  # the other reports are plain text or Markdown
    )
    environment.filters |= filters
    return environment.get_template(name).render(values)
