"""Checks the files that a command will write: no input is overwritten, and other files only with `--force`."""

import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from maskmoe.errors import UserError, refused_by_system
from maskmoe.files.outputs import CURE, check_output_kind, refuse_checkpoint


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
        with refused_by_system(f"cannot write {path}", CURE), tempfile.TemporaryFile(dir=path.parent):
            pass


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
