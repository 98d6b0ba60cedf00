"""Read datasets in Megatron-Core's indexed dataset format with numpy alone.

A dataset is a pair of files (`megatron.core.datasets.indexed_dataset`; all integers are little endian):

`PREFIX.bin`
    The token ids of all sequences, one sequence after the other.
`PREFIX.idx`
    Magic (9 bytes), version (uint64), dtype code (uint8), number of sequences S (uint64), number of documents + 1 = D
    (uint64), sequence lengths in tokens (int32 [S]), sequence offsets in bytes (int64 [S]), index of each document's
    first sequence followed by S (int64 [D]). Multimodal datasets add one mode for each sequence (int8 [S]).

A third file, `PREFIX.tokenizer.json`, records the tokenizer that made the ids. Megatron ignores this file.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from maskmoe.data.tokenizer_record import tokenizer_record_path
from maskmoe.errors import UserError
from maskmoe.files.untrusted import check_regular

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
CODE_OF_DTYPE = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_DTYPE_OF_CODE = {code: np.dtype(name) for name, code in CODE_OF_DTYPE.items()}


def dataset_files(prefix: str | Path) -> list[Path]:
    """Return the paths of all files of a dataset; the last one, the tokenizer's record, need not exist."""
    return [bin_path(prefix), idx_path(prefix), tokenizer_record_path(prefix)]


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the file that holds the token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the file that holds the index."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class DatasetIndex:
    """The content of an `.idx` file, which is mapped into memory.

    Attributes:
        prefix: Path of the pair of files without `.bin` and `.idx`.
        sequence_lengths: Tokens in each sequence, int32 [sequences].
        document_indices: Each document's first sequence, then the number of sequences, int64 [documents + 1].
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: np.ndarray
    document_indices: np.ndarray

    @cached_property
    def num_tokens(self) -> int:
        """Number of token ids in all sequences together."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    def map_tokens(self) -> np.ndarray:
        """Map the token ids into memory, read-only; [tokens], which may be none."""
        if not self.num_tokens:
            return np.empty(0, self.dtype)
        return np.memmap(bin_path(self.prefix), self.dtype, mode="r")

    @property
    def bin_bytes(self) -> int:
        """Size of the `.bin` file in bytes."""
        return self.num_tokens * self.dtype.itemsize

    @cached_property
    def idx_sha256(self) -> str:
        """Hex digest of the `.idx` file."""
        with open(idx_path(self.prefix), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    @property
    def document_boundaries(self) -> np.ndarray:
        """Position of each document's first token, followed by the number of tokens, int64 [documents + 1]."""
        sequence_boundaries = np.concatenate(([0], np.cumsum(self.sequence_lengths, dtype=np.int64)))
        return sequence_boundaries[self.document_indices]


def read_index(prefix: str | Path) -> DatasetIndex:
    """Open `PREFIX.idx`; check that it is consistent and fits the size of `PREFIX.bin`.

    Raises:
        UserError: A file is missing, has another format or is truncated, or the two files do not belong together.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not os.path.exists(path):
            hint = "; give the prefix, without .bin or .idx" if Path(prefix).suffix in (".bin", ".idx") else ""
            raise UserError(f"dataset {prefix}: {path} does not exist{hint}")
        check_regular(path)
    try:
        index = _parse_index(str(prefix), idx_path(prefix))
    except ValueError as error:
        raise UserError(f"{idx_path(prefix)} {error}") from error
    actual = bin_path(prefix).stat().st_size
    if actual != index.bin_bytes:
        raise UserError(
            f"{bin_path(prefix)} has {actual} bytes, but {idx_path(prefix)} describes {index.bin_bytes}; "
            "the files are truncated or belong to different datasets: make the dataset again or copy both files again"
        )
    return index


def _parse_index(prefix: str, path: Path) -> DatasetIndex:
    """Return the content of an index. Raises ValueError if the index is damaged."""
    size = path.stat().st_size
    if size < HEADER.size:
        raise ValueError(f"has {size} bytes, fewer than the {HEADER.size} of an index header; it is truncated")
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    magic, version, code, num_sequences, num_boundaries = HEADER.unpack_from(content)
    if magic != MAGIC:
        raise ValueError(f"is not an index of a Megatron dataset (it does not begin with {MAGIC[:7].decode()})")
    if version != VERSION:
        raise ValueError(f"has format version {version}; only version {VERSION} is known")
    if code not in _DTYPE_OF_CODE:
        raise ValueError(f"has dtype code {code}, which no integer token dtype has")
    described = HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if size not in (described, described + num_sequences):
        raise ValueError(f"has {size} bytes, but its header describes {described}; it is truncated or damaged")
    ends = np.cumsum([HEADER.size, num_sequences * 4, num_sequences * 8, num_boundaries * 8])
    _, lengths, offsets, boundaries, _ = np.split(content, ends)
    lengths, offsets, boundaries = lengths.view("<i4"), offsets.view("<i8"), boundaries.view("<i8")
    dtype = _DTYPE_OF_CODE[code]
    documents_fit = num_boundaries > 0 and boundaries[0] == 0 and boundaries[-1] == num_sequences
    ascends = (np.diff(boundaries) >= 0).all() and (lengths >= 0).all()
    if not (documents_fit and ascends and np.array_equal(offsets, sequence_offsets(lengths, dtype))):
        raise ValueError("contradicts itself (sequence lengths, offsets and document ends disagree); it is damaged")
    return DatasetIndex(prefix, dtype, lengths, boundaries)


def sequence_offsets(sequence_lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the byte offset of each sequence in the `.bin` file, int64 [sequences]."""
    return (np.cumsum(sequence_lengths, dtype=np.int64) - sequence_lengths) * dtype.itemsize


def open_tokens(prefix: str | Path) -> np.ndarray:
    """Map all token ids of a dataset into memory, read-only, [tokens]. Raises UserError if damaged or empty."""
    index = read_index(prefix)
    if index.num_tokens == 0:
        raise UserError(f"{bin_path(prefix)} holds no tokens")
    return index.map_tokens()
