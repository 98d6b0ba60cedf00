"""Find the inputs of text that a user names: files, pipes, standard input and saved datasets of Hugging Face.

A name is looked up in this order: `-` and `/dev/stdin` are standard input; a path of a file or a pipe is that file; a
folder, or a name that does not exist as a path, is a saved dataset, see `maskmoe.data.saved_datasets`. Nothing is
downloaded.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from maskmoe.data.saved_datasets import find_cached_dataset, find_saved_dataset
from maskmoe.errors import UserError
from maskmoe.files.surrogates import refuse_surrogates

FORMATS = ("jsonl", "text", "parquet", "arrow")
STANDARD_INPUT = "-"
_COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FORMAT_OF_SUFFIX = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
_OPEN_FILE = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")  # the name of a file that this process has open
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.?))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "0": "\0", "\\": "\\"}


@dataclass(frozen=True)
class ReadingOptions:
    """How inputs are read.

    Attributes:
        format: One of `FORMATS` for all inputs. None derives the format of each input from the name's suffix.
        separator: Text that ends a document of plain text. None makes a document of each file, see `corpus`.
        split: Name of the split of a saved dataset that has several.
    """

    format: str | None = None
    separator: str | None = None
    split: str | None = None


DEFAULT_OPTIONS = ReadingOptions()


@dataclass(frozen=True)
class Input:
    """One input, which may be a part of a file.

    Attributes:
        path: Path of the file, or `-` for standard input.
        format: One of `FORMATS`.
        num_bytes: Size of the input on disk; None for a pipe, whose size is unknown.
        separator: Bytes that end a document of plain text, or None.
        part: The part of the file that is read, or None for the whole file. For JSON lines and for plain text with a
            separator, the documents that start in this range of bytes; for Parquet and Arrow files, the range of row
            groups or record batches.
        is_guessed: Whether the format is a guess, because a pipe's name does not tell it.
    """

    path: str
    format: str
    num_bytes: int | None
    separator: bytes | None = None
    part: range | None = None
    is_guessed: bool = False

    @property
    def name(self) -> str:
        """The input's name for people."""
        name = "standard input" if self.path == STANDARD_INPUT else self.path
        return f"{name} (read as {self.format}, see --input-format)" if self.is_guessed else name

    def open(self) -> BufferedReader:
        """Open the file for reading. Standard input stays open when the result is closed.

        Raises:
            OSError: The file cannot be opened.
        """
        if self.path == STANDARD_INPUT:
            return open(0, "rb", closefd=False)
        return open(self.path, "rb")


def find_inputs(names: Sequence[str | Path], options: ReadingOptions = DEFAULT_OPTIONS) -> list[Input]:
    """Return the inputs that the names stand for, in order.

    Raises:
        UserError: A name stands for nothing that can be read, a pipe is named twice, or an option fits no input.
    """
    inputs = [source for name in names for source in _find(str(name), options)]
    pipes = [_identity(source.path) for source in inputs if _can_be_read_once(source)]
    if len(set(pipes)) < len(pipes):
        raise UserError("a pipe or standard input is named twice as input, but it can be read only once")
    if options.separator is not None and all(source.format != "text" for source in inputs):
        raise UserError("--document-separator divides plain text, but no input is plain text")
    return inputs


def unescape(text: str) -> str:
    r"""Replace the escapes `\n`, `\r`, `\t`, `\f`, `\0`, `\\`, `\xHH` and `\uHHHH` by their characters.

    Raises:
        UserError: The text is empty, has another escape, or has a character that UTF-8 cannot encode.
    """

    def replace(match: re.Match) -> str:
        code = match[1] or match[2]
        if code is None and match[3] not in _LETTERS:
            raise UserError(rf"{match[0]!r} is no escape; write \n, \r, \t, \f, \0, \xHH or \uHHHH, and \\ for \ ")
        return chr(int(code, 16)) if code else _LETTERS[match[3]]

    result = _ESCAPE.sub(replace, text)
    if not result:
        raise UserError("a document separator must not be empty")
    refuse_surrogates(result, "the document separator")
    return result


def _find(name: str, options: ReadingOptions) -> list[Input]:
    """Return the inputs that a name stands for: several for a saved dataset, else one."""
    name = STANDARD_INPUT if name == "/dev/stdin" else name
    try:
        status = os.fstat(0) if name == STANDARD_INPUT else os.stat(name)
    except FileNotFoundError:
        return _inputs_of_dataset(name, find_cached_dataset(name, options.split), options)
    except (OSError, ValueError) as error:
        place = "standard input" if name == STANDARD_INPUT else name
        raise UserError(f"input {place} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode) and name != STANDARD_INPUT:
        return _inputs_of_dataset(name, find_saved_dataset(Path(name), options.split), options)
    if not _has_an_end(name, status):
        place = "standard input" if name == STANDARD_INPUT else name
        raise UserError(f"input {place} is a device, not a file or a pipe")
    if options.split is not None:
        raise UserError(f"--dataset-split is for saved datasets, but input {name} is not one")
    is_file = stat.S_ISREG(status.st_mode)
    known = options.format or _format_of(name)
    is_pipe = name == STANDARD_INPUT or _OPEN_FILE.fullmatch(name) is not None or not is_file
    format_ = known or ("jsonl" if is_pipe else "text")
    if format_ == "parquet" and (name == STANDARD_INPUT or not is_file):
        raise UserError("a Parquet file cannot be read from a pipe or from standard input; name the file")
    separator = options.separator.encode() if options.separator is not None and format_ == "text" else None
    size = status.st_size if is_file else None
    return [Input(name, format_, size, separator, is_guessed=known is None and is_pipe)]


def _inputs_of_dataset(name: str, files: Sequence[Path], options: ReadingOptions) -> list[Input]:
    if options.format not in (None, "arrow"):
        raise UserError(f"input {name} is a saved dataset of Arrow files, but --input-format is {options.format}")
    return [Input(str(path), "arrow", path.stat().st_size) for path in files]


def compression_of_name(name: str) -> str | None:
    """Return the compression, `gzip` or `zstd`, that the suffix of a name tells; None if the suffix tells none."""
    return _COMPRESSION_OF_SUFFIX.get(Path(name).suffix.lower())


def _format_of(name: str) -> str | None:
    """Return the format that the suffix of a name tells; None for a name without suffix."""
    path = Path(name)
    suffix = Path(path.stem).suffix if compression_of_name(name) else path.suffix
    return _FORMAT_OF_SUFFIX.get(suffix.lower(), "text" if suffix else None)


def _has_an_end(name: str, status: os.stat_result) -> bool:
    """Return whether reading ends: of devices, only `/dev/null` and terminals that are open have an end."""
    if stat.S_ISCHR(status.st_mode):
        match = _OPEN_FILE.fullmatch(name)
        descriptor = 0 if name == STANDARD_INPUT else int(match[1]) if match else None
        is_terminal = descriptor is not None and os.isatty(descriptor)
        return is_terminal or status.st_rdev == os.stat(os.devnull).st_rdev
    return not stat.S_ISBLK(status.st_mode)


def _can_be_read_once(source: Input) -> bool:
    return source.path == STANDARD_INPUT or source.num_bytes is None


def _identity(path: str) -> tuple[int, int]:
    """Return the numbers that identify an open file, whatever name it is called by."""
    status = os.fstat(0) if path == STANDARD_INPUT else os.stat(path)
    return status.st_dev, status.st_ino
