"""Find the texts that a user names: files, pipes and standard input.

A `Shard` divides the inputs among many machines: each gets a range of consecutive files of about equal size.

Reading text is a pipeline: `find_inputs` turns names into inputs, `maskmoe.data.documents.read_blocks` reads inputs in
blocks of whole documents, and each block is then parsed into documents, often by another process.
"""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from io import BufferedReader
from itertools import accumulate
from pathlib import Path

from maskmoe.errors import UserError

FORMATS = ("jsonl", "text", "parquet")
STANDARD_INPUT = "-"
_COMPRESSION_OF_SUFFIX = {".gz": "gzip", ".gzip": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FORMAT_OF_SUFFIX = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
}


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        path: Path of the file, or `-` for standard input.
        format: One of `FORMATS`.
        num_bytes: Size of the input on disk; None for a pipe, whose size is unknown.
        separator: Bytes that end a document of plain text, or None.
        is_guess: Whether the file counts as plain text only because its name tells no other format.
    """

    path: str
    format: str
    num_bytes: int | None
    separator: bytes | None = None
    is_guess: bool = False

    @property
    def name(self) -> str:
        """The input's name for people."""
        return "standard input" if self.path == STANDARD_INPUT else self.path

    @property
    def is_stream(self) -> bool:
        """Whether the input is a pipe or standard input, which can be read only once."""
        return self.num_bytes is None or self.path == STANDARD_INPUT

    def open(self) -> BufferedReader:
        """Open the file for reading. Standard input stays open when the result is closed.

        Raises:
            OSError: The file cannot be opened.
        """
        if self.path == STANDARD_INPUT:
            return open(0, "rb", closefd=False)
        return open(self.path, "rb")


def find_inputs(names: Sequence[str | Path], format: str | None = None, separator: str | None = None) -> list[Input]:
    """Return the inputs that the names stand for, in order.

    Args:
        names: Names of files and pipes, or `-` for standard input.
        format: One of `FORMATS` for all inputs. None derives the format of each input from the name's suffix.
        separator: Text that ends a document of plain text. None divides long files into several documents.

    Raises:
        UserError: A name stands for nothing that can be read, a pipe is named twice, or an option fits no input.
    """
    inputs = [_find(str(name), format, separator) for name in names]
    streams = [source.path for source in inputs if source.is_stream]
    if len(set(streams)) < len(streams):
        raise UserError("a pipe or standard input is named twice as input, but it can be read only once")
    if separator is not None and all(source.format != "text" for source in inputs):
        raise UserError("--document-separator divides plain text, but no input is plain text")
    return inputs


def unescape(text: str) -> str:
    r"""Replace Python's escapes, such as `\n`, `\t` and `\xHH`, by their characters.

    Raises:
        UserError: The text is empty, has an incomplete escape, or has a character that UTF-8 cannot encode.
    """
    try:
        result = text.encode("latin-1", "backslashreplace").decode("unicode_escape")
        result.encode("utf-8")
    except UnicodeError as error:
        raise UserError(f"--document-separator {text!a} has an incomplete escape or an invalid byte") from error
    if not result:
        raise UserError("--document-separator must not be empty")
    return result


def compression_of_name(name: str) -> str | None:
    """Return the compression, `gzip` or `zstd`, that the suffix of a name tells; None if the suffix tells none."""
    return _COMPRESSION_OF_SUFFIX.get(Path(name).suffix.lower())


def _find(name: str, format: str | None, separator: str | None) -> Input:
    """Return the input that a name stands for."""
    name = STANDARD_INPUT if name == "/dev/stdin" else name
    try:
        status = os.fstat(0) if name == STANDARD_INPUT else os.stat(name)
    except FileNotFoundError as error:
        raise UserError(f"input {name} does not exist") from error
    except (OSError, ValueError) as error:
        place = "standard input" if name == STANDARD_INPUT else name
        raise UserError(f"input {place} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"input {name} is a folder; name its files, such as {Path(name) / '*.jsonl'}")
    if name != STANDARD_INPUT and (stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise UserError(f"input {name} is a device, not a file or a pipe")
    size = status.st_size if stat.S_ISREG(status.st_mode) else None
    is_stream = size is None or name == STANDARD_INPUT or name.startswith("/dev/fd/")
    is_guess = format is None and separator is None
    format = format or _format_of(name) or ("jsonl" if is_stream else "text")
    if format == "parquet" and is_stream:
        raise UserError("a Parquet file cannot be read from a pipe or from standard input; name the file")
    end = separator.encode() if separator is not None and format == "text" else None
    return Input(name, format, size, end, is_guess and format == "text")


def _format_of(name: str) -> str | None:
    """Return the format that the suffix of a name tells; None for a name without suffix."""
    path = Path(name)
    suffix = Path(path.stem).suffix if compression_of_name(name) else path.suffix
    return _FORMAT_OF_SUFFIX.get(suffix.lower(), "text" if suffix else None)


@dataclass(frozen=True)
class Shard:
    """The part of the inputs that a machine reads.

    Attributes:
        index: Number of the part, counted from 0.
        count: Number of all parts.
    """

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read `I/N`, such as `0/8` to `7/8`.

        Raises:
            UserError: The text has another form, or I is not in 0 to N - 1.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard must be I/N with I from 0 to N - 1, such as 0/8 to 7/8, not {text!r}")
        return cls(int(match[1]), int(match[2]))

    def prefix(self, output_prefix: str | Path) -> str:
        """Return the output prefix of this shard, such as `data/web-00003-of-00016`."""
        return f"{output_prefix}-{self.index:05d}-of-{self.count:05d}"


def take_shard(inputs: Sequence[Input], shard: Shard) -> list[Input]:
    """Return the inputs that belong to a shard; the list may be empty.

    The shards divide the bytes of all inputs evenly. A file belongs to the shard that holds the byte in its middle.

    Raises:
        UserError: An input is a pipe or standard input.
    """
    for source in inputs:
        # Standard input may begin in the middle of a file, but shards are made of whole files.
        if source.is_stream:
            raise UserError(f"--shard needs files, but input {source.name} is a pipe or standard input: name a file")
    sizes = [source.num_bytes or 0 for source in inputs]
    first, last = (sum(sizes) * number // shard.count for number in (shard.index, shard.index + 1))
    last += shard.index + 1 == shard.count  # the last shard has the empty files at the end
    middles = [before + size // 2 for before, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]
    return [source for source, middle in zip(inputs, middles, strict=True) if first <= middle < last]
