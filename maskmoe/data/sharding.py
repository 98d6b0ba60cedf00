"""Divide inputs among many machines: machine I of N gets a range of consecutive files of about equal size.

The files of all machines, one after the other, are all files in the order of the inputs.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from maskmoe.data.inputs import Input
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
            are read and divided, and the tokenizer. Shards of one text have the same digest.
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
        text = json.dumps([files, list(json_keys), append_eod, record.type, record.sha256, "whole files"])
        return cls(shard.index, shard.count, hashlib.sha256(text.encode()).hexdigest())


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
    middles = [before + size // 2 for before, size in zip(accumulate(sizes, initial=0), sizes, strict=False)]
    return [source for source, middle in zip(inputs, middles, strict=True) if first <= middle < last]
