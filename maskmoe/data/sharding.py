"""Divide inputs among many machines: machine I of N gets a range of consecutive documents of about equal size.

The ranges of all machines, one after the other, are all documents in the order of the inputs. JSON lines and plain text
with a separator are divided between any two documents, and Parquet and Arrow files between row groups and record
batches. Other files are not divided: compressed files, Arrow streams, and plain text without a separator.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from maskmoe.data.arrow_files import sizes_of_pieces
from maskmoe.data.corpus import is_compressed
from maskmoe.data.inputs import STANDARD_INPUT, Input
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError


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


def shard_record_path(prefix: str | Path) -> Path:
    """Return the path of the file that records which shard a dataset is."""
    return Path(f"{prefix}.shard.json")


@dataclass(frozen=True)
class ShardRecord:
    """Says which part of which text a dataset is.

    Attributes:
        index: Number of the shard, counted from 0.
        count: Number of all shards.
        text_sha256: Hex digest of all that decides the documents and their ids: names and sizes of all inputs, how they
            are read, and the tokenizer. Shards of one text have the same digest.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads this attribute of the class

    index: int
    count: int
    text_sha256: str

    @classmethod
    def of(
        cls, shard: Shard, inputs: Sequence[Input], json_keys: Sequence[str], append_eod: bool, record: TokenizerRecord
    ) -> "ShardRecord":
        """Return the record of a shard of the inputs. Folders are left out: machines may mount them elsewhere."""
        files = [[Path(source.path).name, source.num_bytes, source.format, str(source.separator)] for source in inputs]
        text = json.dumps([files, list(json_keys), append_eod, record.type, record.sha256])
        return cls(shard.index, shard.count, hashlib.sha256(text.encode()).hexdigest())


def take_shard(inputs: Sequence[Input], shard: Shard) -> list[Input]:
    """Return the inputs, or parts of inputs, that belong to a shard; the list may be empty.

    Raises:
        UserError: An input is a pipe or standard input, or a Parquet or Arrow file is damaged.
    """
    for source in inputs:
        # Standard input may begin in the middle of a file, but shards are ranges of the whole file.
        if source.path == STANDARD_INPUT:
            raise UserError("--shard needs files, but an input is standard input: name the file")
        if source.num_bytes is None:
            raise UserError(f"--shard needs files, but input {source.name} is a pipe")
    ends = list(accumulate(source.num_bytes or 0 for source in inputs))
    total = ends[-1] if ends else 0
    # Bytes of all inputs together, from which on and up to which documents belong to this shard.
    first, last = (total * number // shard.count for number in (shard.index, shard.index + 1))
    parts = []
    for source, end in zip(inputs, ends, strict=True):
        num_bytes = source.num_bytes or 0
        start = end - num_bytes
        if start < last and end > first:
            part = source if first <= start and end <= last else _part(source, first - start, last - start)
            if part is not None:
                parts.append(part)
    return parts


def _part(source: Input, first: int, last: int) -> Input | None:
    """Return the part of a file from byte `first` to byte `last`, which may lie outside the file; None if it is empty.

    An undivided piece belongs to the part in which its middle lies.
    """
    num_bytes = source.num_bytes or 0
    if source.format in ("jsonl", "text"):
        if _can_be_cut(source):
            part = range(max(first, 0), min(last, num_bytes))
            return replace(source, part=part, num_bytes=len(part))
        sizes = None
    else:
        sizes = sizes_of_pieces(source)
    if sizes is None:
        return source if first <= num_bytes // 2 < last else None
    ends = list(accumulate(sizes))
    middles = [num_bytes * (2 * end - size) // (2 * ends[-1]) for end, size in zip(ends, sizes, strict=True)]
    pieces = [number for number, middle in enumerate(middles) if first <= middle < last]
    if not pieces:
        return None
    share = num_bytes * sum(sizes[number] for number in pieces) // ends[-1]
    return replace(source, part=range(pieces[0], pieces[-1] + 1), num_bytes=share)


def _can_be_cut(source: Input) -> bool:
    """Return whether documents of text can be found from any byte on."""
    if source.format == "text":
        separator = source.separator or b""
        # The end of such a separator is the start of another one, as in "\n\n\n".
        overlaps = any(separator.endswith(separator[:size]) for size in range(1, len(separator)))
        if not separator or overlaps:
            return False
    return not is_compressed(source.path)
