"""Read and write Megatron-Core's indexed dataset format with numpy alone.

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
import json
import struct
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_CODE_OF_DTYPE = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_DTYPE_OF_CODE = {code: np.dtype(name) for name, code in _CODE_OF_DTYPE.items()}


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that stores ids of a vocabulary, as Megatron-Core's `DType.optimal_dtype` does."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """Return the path of the file that holds the token ids."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Return the path of the file that holds the index."""
    return Path(f"{prefix}.idx")


def tokenizer_record_path(prefix: str | Path) -> Path:
    """Return the path of the file that records the tokenizer."""
    return Path(f"{prefix}.tokenizer.json")


@dataclass(frozen=True)
class DatasetIndex:
    """The content of an `.idx` file.

    Attributes:
        dtype: Dtype of the token ids in the `.bin` file.
        sequence_lengths: Tokens in each sequence, int32 [sequences].
        document_indices: Index of each document's first sequence, followed by the number of sequences,
            int64 [documents + 1].
    """

    dtype: np.dtype
    sequence_lengths: np.ndarray
    document_indices: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of token ids in all sequences together."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    @property
    def document_boundaries(self) -> np.ndarray:
        """Position of each document's first token, followed by the number of tokens, int64 [documents + 1]."""
        sequence_boundaries = np.concatenate(([0], np.cumsum(self.sequence_lengths, dtype=np.int64)))
        return sequence_boundaries[self.document_indices]


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """Identity and size of a dataset.

    Attributes:
        prefix: Path of the pair of files without `.bin` and `.idx`.
        dtype: Dtype of the token ids.
        num_sequences: Number of sequences.
        num_documents: Number of documents.
        num_tokens: Number of tokens.
        bin_bytes: Size of the `.bin` file in bytes.
        idx_sha256: Hex digest of the `.idx` file.
    """

    prefix: str
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    bin_bytes: int
    idx_sha256: str


def read_index(prefix: str | Path) -> DatasetIndex:
    """Read `PREFIX.idx`; check that it is consistent and fits the size of `PREFIX.bin`.

    Raises:
        UserError: A file is missing, has another format or is truncated, or the two files do not belong together.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            hint = "; give the prefix, without .bin or .idx" if Path(prefix).suffix in (".bin", ".idx") else ""
            raise UserError(f"dataset {prefix}: {path} does not exist{hint}")
    index = _parse_index(idx_path(prefix))
    expected, actual = index.num_tokens * index.dtype.itemsize, bin_path(prefix).stat().st_size
    if actual != expected:
        raise UserError(
            f"{bin_path(prefix)} has {actual} bytes, but {idx_path(prefix)} describes {expected}; "
            "the files are truncated or belong to different datasets: make the dataset again or copy both files again"
        )
    return index


def _parse_index(path: Path) -> DatasetIndex:
    actual = path.stat().st_size
    if actual < _HEADER.size:
        raise UserError(f"{path} has {actual} bytes, fewer than the {_HEADER.size} of an index header; it is truncated")
    with open(path, "rb") as stream:
        magic, version, code, num_sequences, num_boundaries = _HEADER.unpack(stream.read(_HEADER.size))
        if magic != _MAGIC:
            raise UserError(
                f"{path} is not an index of a Megatron dataset (it does not begin with {_MAGIC[:7].decode()})"
            )
        if version != _VERSION:
            raise UserError(f"{path} has format version {version}; only version {_VERSION} is known")
        if code not in _DTYPE_OF_CODE:
            raise UserError(f"{path} has dtype code {code}, which no integer token dtype has")
        text_only = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
        if actual not in (text_only, text_only + num_sequences):
            raise UserError(
                f"{path} has {actual} bytes, but its header describes {text_only}; it is truncated or damaged"
            )
        sequence_lengths = np.fromfile(stream, "<i4", num_sequences)
        sequence_offsets = np.fromfile(stream, "<i8", num_sequences)
        document_indices = np.fromfile(stream, "<i8", num_boundaries)
    index = DatasetIndex(_DTYPE_OF_CODE[code], sequence_lengths, document_indices)
    consistent = (
        num_boundaries > 0
        and document_indices[0] == 0
        and document_indices[-1] == num_sequences
        and bool((np.diff(document_indices) >= 0).all())
        and bool((sequence_lengths >= 0).all())
        and np.array_equal(sequence_offsets, _sequence_offsets(sequence_lengths, index.dtype))
    )
    if not consistent:
        raise UserError(
            f"{path} contradicts itself (sequence lengths, offsets and document ends disagree); it is damaged"
        )
    return index


def _sequence_offsets(sequence_lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the byte offset of each sequence in the `.bin` file, int64 [sequences]."""
    ends = np.cumsum(sequence_lengths, dtype=np.int64) * dtype.itemsize
    return np.concatenate(([0], ends[:-1])) if ends.size else ends


def open_tokens(prefix: str | Path) -> np.memmap:
    """Map all token ids of a dataset into memory, read-only; [tokens] in the dataset's dtype.

    Raises:
        UserError: The dataset is damaged, see `read_index`, or has no tokens.
    """
    index = read_index(prefix)
    if index.num_tokens == 0:
        raise UserError(f"{bin_path(prefix)} holds no tokens")
    return np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")


def read_info(prefix: str | Path) -> IndexedDatasetInfo:
    """Return the identity and size of a dataset.

    Raises:
        UserError: The dataset is damaged, see `read_index`.
    """
    index = read_index(prefix)
    with open(idx_path(prefix), "rb") as stream:
        idx_sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return IndexedDatasetInfo(
        prefix=str(prefix),
        dtype=index.dtype,
        num_sequences=len(index.sequence_lengths),
        num_documents=len(index.document_indices) - 1,
        num_tokens=index.num_tokens,
        bin_bytes=bin_path(prefix).stat().st_size,
        idx_sha256=idx_sha256,
    )


def read_tokenizer_record(prefix: str | Path) -> TokenizerRecord | None:
    """Return the record of the tokenizer that made the dataset.

    The result is None if there is no record, as for datasets made by Megatron's own tools.

    Raises:
        UserError: The record exists but is not valid.
    """
    path = tokenizer_record_path(prefix)
    if not path.exists():
        return None
    try:
        return TokenizerRecord.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a tokenizer record ({error}); delete it or make the dataset again") from error


class IndexedDatasetWriter:
    """Writes a dataset document by document; the files get their names only after all tokens are written.

    Use the writer as a context manager. Leaving the context normally publishes the dataset and replaces an earlier
    dataset of the same prefix. Leaving the context with an exception publishes nothing and keeps the earlier dataset.
    The old index is removed first and the new index is published last, so that an index never lies beside token ids
    that it does not describe.

    Args:
        prefix: Path of the files without `.bin` and `.idx`.
        dtype: Dtype of the stored ids, see `optimal_dtype`.
        tokenizer: Tokenizer to record in `PREFIX.tokenizer.json`; None writes no record.

    Raises:
        UserError: On entering the context, if the folder does not exist or is not writable.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, tokenizer: TokenizerRecord | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.tokenizer = tokenizer
        self._sequence_lengths = array("i")
        self._document_indices = array("q", [0])
        self._files = ExitStack()

    def __enter__(self) -> "IndexedDatasetWriter":
        # Files get their final names in the reverse order of this stack: .bin, tokenizer record, .idx.
        with ExitStack() as files:
            self._idx = files.enter_context(atomic_output(idx_path(self.prefix)))
            if self.tokenizer is not None:
                record = files.enter_context(atomic_output(tokenizer_record_path(self.prefix)))
                record.write_text(json.dumps(self.tokenizer.to_json(), indent=2) + "\n", encoding="utf-8")
            self._bin = files.enter_context(open(files.enter_context(atomic_output(bin_path(self.prefix))), "wb"))
            self._files = files.pop_all()
        return self

    def add_document(self, tokens: np.ndarray, sequence_lengths: Sequence[int] | None = None) -> None:
        """Append one document.

        Args:
            tokens: Ids of all sequences of the document, integer [tokens].
            sequence_lengths: Tokens in each sequence. If None, the document is one sequence, or none if it is empty.

        Raises:
            ValueError: An id does not fit the dtype, or the lengths do not sum up to the number of tokens.
        """
        if sequence_lengths is None:
            sequence_lengths = [len(tokens)] if len(tokens) else []
        if sum(sequence_lengths) != len(tokens):
            raise ValueError(f"sequence lengths sum up to {sum(sequence_lengths)}, but there are {len(tokens)} tokens")
        self._write_tokens(tokens)
        self._sequence_lengths.extend(int(length) for length in sequence_lengths)
        self._document_indices.append(len(self._sequence_lengths))

    def add_documents(self, tokens: np.ndarray, document_lengths: np.ndarray) -> None:
        """Append many documents at once; each is one sequence, or none if it is empty.

        Args:
            tokens: Ids of all documents, one document after the other, integer [tokens].
            document_lengths: Tokens in each document, integer [documents].

        Raises:
            ValueError: An id does not fit the dtype, or the lengths do not sum up to the number of tokens.
        """
        if document_lengths.sum() != len(tokens):
            raise ValueError(
                f"documents' lengths sum up to {document_lengths.sum()}, but there are {len(tokens)} tokens"
            )
        self._write_tokens(tokens)
        ends = len(self._sequence_lengths) + np.cumsum(document_lengths > 0, dtype=np.int64)
        self._sequence_lengths.frombytes(document_lengths[document_lengths > 0].astype(np.int32).tobytes())
        self._document_indices.frombytes(ends.tobytes())

    def _write_tokens(self, tokens: np.ndarray) -> None:
        tokens = np.asarray(tokens)
        if tokens.dtype != self.dtype and tokens.size:
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, traceback)
            return
        with self._files:
            self._bin.close()
            self._write_index()
            idx_path(self.prefix).unlink(missing_ok=True)
            if self.tokenizer is None:
                tokenizer_record_path(self.prefix).unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._sequence_lengths, np.int32)
        boundaries = np.frombuffer(self._document_indices, np.int64)
        header = _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self.dtype.name], len(lengths), len(boundaries))
        offsets = _sequence_offsets(lengths, self.dtype)
        with open(self._idx, "wb") as stream:
            for part in (header, lengths, offsets, boundaries):
                stream.write(part)
