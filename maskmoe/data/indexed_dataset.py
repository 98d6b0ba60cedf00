"""Read, write and shuffle datasets in Megatron-Core's indexed dataset format with numpy alone.

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
import os
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import check_regular, read_json_bytes

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_CODE_OF_DTYPE = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
_BATCH_TOKENS = 1 << 20  # copied at a time
_DTYPE_OF_CODE = {code: np.dtype(name) for name, code in _CODE_OF_DTYPE.items()}


def dataset_files(prefix: str | Path) -> list[Path]:
    """Return the paths of all files of a dataset; the last one, the tokenizer's record, need not exist."""
    return [bin_path(prefix), idx_path(prefix), tokenizer_record_path(prefix)]


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
    """The content of an `.idx` file, which is mapped into memory.

    Attributes:
        prefix: Path of the pair of files without `.bin` and `.idx`.
        dtype: Dtype of the token ids in the `.bin` file.
        sequence_lengths: Tokens in each sequence, int32 [sequences].
        document_indices: Index of each document's first sequence, followed by the number of sequences,
            int64 [documents + 1].
    """

    prefix: str
    dtype: np.dtype
    sequence_lengths: np.ndarray
    document_indices: np.ndarray

    @cached_property
    def num_tokens(self) -> int:
        """Number of token ids in all sequences together."""
        return int(self.sequence_lengths.sum(dtype=np.int64))

    @property
    def bin_bytes(self) -> int:
        """Size of the `.bin` file in bytes."""
        return self.num_tokens * self.dtype.itemsize

    @property
    def has_modes(self) -> bool:
        """Whether the sequences have modes, as in multimodal datasets."""
        num_integers = 12 * len(self.sequence_lengths) + 8 * len(self.document_indices)
        return idx_path(self.prefix).stat().st_size != _HEADER.size + num_integers

    @property
    def has_documents_of_many_sequences(self) -> bool:
        """Whether a document has more than one sequence."""
        return bool((np.diff(self.document_indices) > 1).any())

    @property
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
    if size < _HEADER.size:
        raise ValueError(f"has {size} bytes, fewer than the {_HEADER.size} of an index header; it is truncated")
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    magic, version, code, num_sequences, num_boundaries = _HEADER.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError(f"is not an index of a Megatron dataset (it does not begin with {_MAGIC[:7].decode()})")
    if version != _VERSION:
        raise ValueError(f"has format version {version}; only version {_VERSION} is known")
    if code not in _DTYPE_OF_CODE:
        raise ValueError(f"has dtype code {code}, which no integer token dtype has")
    described = _HEADER.size + num_sequences * (4 + 8) + num_boundaries * 8
    if size not in (described, described + num_sequences):
        raise ValueError(f"has {size} bytes, but its header describes {described}; it is truncated or damaged")
    ends = np.cumsum([_HEADER.size, num_sequences * 4, num_sequences * 8, num_boundaries * 8])
    _, lengths, offsets, boundaries, _ = np.split(content, ends)
    lengths, offsets, boundaries = lengths.view("<i4"), offsets.view("<i8"), boundaries.view("<i8")
    dtype = _DTYPE_OF_CODE[code]
    documents_fit = num_boundaries > 0 and boundaries[0] == 0 and boundaries[-1] == num_sequences
    ascends = (np.diff(boundaries) >= 0).all() and (lengths >= 0).all()
    if not (documents_fit and ascends and np.array_equal(offsets, _sequence_offsets(lengths, dtype))):
        raise ValueError("contradicts itself (sequence lengths, offsets and document ends disagree); it is damaged")
    return DatasetIndex(prefix, dtype, lengths, boundaries)


def _sequence_offsets(sequence_lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return the byte offset of each sequence in the `.bin` file, int64 [sequences]."""
    return (np.cumsum(sequence_lengths, dtype=np.int64) - sequence_lengths) * dtype.itemsize


def open_tokens(prefix: str | Path) -> np.memmap:
    """Map all token ids of a dataset into memory, read-only; [tokens] in the dataset's dtype.

    Raises:
        UserError: The dataset is damaged, see `read_index`, or has no tokens.
    """
    index = read_index(prefix)
    if index.num_tokens == 0:
        raise UserError(f"{bin_path(prefix)} holds no tokens")
    return np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")


def read_tokenizer_record(prefix: str | Path) -> TokenizerRecord | None:
    """Return the record of the tokenizer that made the dataset.

    The result is None if there is no record, as for datasets made by Megatron's own tools.

    Raises:
        UserError: The record exists but is not valid.
    """
    from maskmoe.files.json_files import type_adapter  # imported late: making datasets does not need pydantic

    path = tokenizer_record_path(prefix)
    if not os.path.lexists(path):
        return None
    try:
        return type_adapter(TokenizerRecord).validate_json(read_json_bytes(path), strict=True)
    except ValueError as error:
        raise UserError(f"{path} is not a tokenizer record; delete it or make the dataset again") from error


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

    Attributes:
        prefix: Path of the files without `.bin` and `.idx`.
        dtype: Dtype of the stored ids.
        num_tokens: Number of token ids that were added.

    Raises:
        UserError: On entering the context, if the folder does not exist or is not writable.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, tokenizer: TokenizerRecord | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.num_tokens = 0
        self._sequence_lengths = array("i")
        self._document_indices = array("q", [0])
        self._files = self._write_files(prefix, tokenizer)

    @property
    def num_documents(self) -> int:
        """Number of documents, including documents without tokens."""
        return len(self._document_indices) - 1

    def __enter__(self) -> "IndexedDatasetWriter":
        self._bin = self._files.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._files.__exit__(*failure)

    @contextmanager
    def _write_files(self, prefix: str | Path, tokenizer: TokenizerRecord | None) -> Iterator[BinaryIO]:
        """Yield the open file of token ids; then write the index, and give all files their names."""
        record_path = tokenizer_record_path(prefix)
        # Files get their final names in the reverse order of this stack: .bin, tokenizer record, .idx.
        with ExitStack() as files:
            new_idx = files.enter_context(atomic_output(idx_path(prefix)))
            if tokenizer is not None:
                text = json.dumps(asdict(tokenizer), indent=2) + "\n"
                files.enter_context(atomic_output(record_path)).write_text(text, encoding="utf-8")
            with open(files.enter_context(atomic_output(bin_path(prefix))), "wb") as stream:
                yield stream
            lengths = np.frombuffer(self._sequence_lengths, np.int32)
            boundaries = np.frombuffer(self._document_indices, np.int64)
            header = _HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self.dtype.name], len(lengths), len(boundaries))
            with open(new_idx, "wb") as stream:
                for part in (header, lengths, _sequence_offsets(lengths, self.dtype), boundaries):
                    stream.write(part)
            idx_path(prefix).unlink(missing_ok=True)
            if tokenizer is None:
                record_path.unlink(missing_ok=True)

    def add_document(self, tokens: np.ndarray) -> None:
        """Append one document, which is one sequence, or none if it is empty; see `add_documents`."""
        self.add_documents(tokens, np.array([len(tokens)]))

    def add_documents(self, tokens: np.ndarray, document_lengths: np.ndarray) -> None:
        """Append many documents at once; each is one sequence, or none if it is empty.

        Args:
            tokens: Ids of all documents, one document after the other, integer [tokens].
            document_lengths: Tokens in each document, integer [documents].

        Raises:
            ValueError: An id does not fit the dtype, or the lengths do not sum up to the number of tokens.
        """
        has_tokens = document_lengths > 0
        self.add_sequences(tokens, document_lengths[has_tokens], has_tokens)

    def add_sequences(
        self, tokens: np.ndarray, sequence_lengths: np.ndarray, sequences_of_documents: np.ndarray
    ) -> None:
        """Append many documents of any number of sequences.

        Args:
            tokens: Ids of all sequences, one sequence after the other, integer [tokens].
            sequence_lengths: Tokens in each sequence, integer [sequences].
            sequences_of_documents: Number of sequences of each document, integer [documents].

        Raises:
            ValueError: An id does not fit the dtype, or the lengths do not sum up to the number of tokens.
        """
        if sequence_lengths.sum() != len(tokens):
            raise ValueError(f"lengths sum up to {sequence_lengths.sum()}, but there are {len(tokens)} tokens")
        if tokens.dtype != self.dtype and tokens.size:
            limits = np.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {self.dtype}")
        self._bin.write(np.ascontiguousarray(tokens, self.dtype))
        ends = len(self._sequence_lengths) + np.cumsum(sequences_of_documents, dtype=np.int64)
        self._document_indices.frombytes(ends.tobytes())
        self._sequence_lengths.frombytes(sequence_lengths.astype(np.int32).tobytes())
        self.num_tokens += len(tokens)


def copy_in_order(sources: Sequence[str | Path], writer: IndexedDatasetWriter) -> None:
    """Append all documents of some datasets to `writer`, one dataset after the other.

    The tokens are read through a memory map, so memory holds only a few integers for each document.

    Args:
        sources: Prefixes of the datasets to copy.
        writer: An open writer of the copy.

    Raises:
        UserError: A dataset is damaged.
    """
    for source in tqdm(sources, unit="dataset", desc="merging", disable=None):
        index = read_index(source)
        writer.add_sequences(_map_tokens(index), index.sequence_lengths, np.diff(index.document_indices))


def copy_shuffled(sources: Sequence[str | Path], writer: IndexedDatasetWriter, seed: int) -> None:
    """Append all documents of some datasets to `writer` in an order that depends only on `seed` and their number.

    Datasets with the same number of documents are therefore shuffled alike, and many datasets like their concatenation.
    The tokens are read through memory maps, so memory holds about a million tokens, or the largest document, and a few
    integers for each document.

    Args:
        sources: Prefixes of the datasets to copy. Each document is at most one sequence.
        writer: An open writer of the copy.
        seed: Seed of the order, not negative.

    Raises:
        UserError: A dataset is damaged.
    """
    tokens, starts, lengths = [], [], []
    for source in sources:
        index = read_index(source)
        boundaries = index.document_boundaries
        tokens.append(_map_tokens(index))
        starts.append(boundaries[:-1])
        lengths.append(np.diff(boundaries))
    source_of_document = np.repeat(np.arange(len(sources), dtype=np.int32), [len(array) for array in starts])
    start_of_document, length_of_document = np.concatenate(starts), np.concatenate(lengths)
    order = np.random.default_rng(seed).permutation(len(source_of_document))
    with tqdm(total=len(order), unit="document", unit_scale=True, desc="shuffling", disable=None) as bar:
        for batch in _batches(length_of_document[order]):
            documents = order[batch.start : batch.stop]
            places = zip(
                source_of_document[documents].tolist(),
                start_of_document[documents].tolist(),
                length_of_document[documents].tolist(),
                strict=True,
            )
            parts = [tokens[source][start : start + length] for source, start, length in places]
            writer.add_documents(np.concatenate(parts), np.array([len(part) for part in parts]))
            bar.update(len(documents))


def _map_tokens(index: DatasetIndex) -> np.ndarray:
    """Map the token ids of a dataset into memory, read-only; [tokens], which may be none."""
    path = bin_path(index.prefix)
    return np.asarray(np.memmap(path, index.dtype, mode="r")) if index.num_tokens else np.empty(0, index.dtype)


def _batches(lengths: np.ndarray) -> Iterator[range]:
    """Divide documents into ranges; a range ends after the document that fills up another million tokens.

    Args:
        lengths: Tokens in each document, integer [documents].
    """
    ends = np.flatnonzero(np.diff(np.cumsum(lengths) // _BATCH_TOKENS)) + 1
    yield from (range(*bounds) for bounds in pairwise([0, *ends.tolist(), len(lengths)]) if bounds[0] < bounds[1])
