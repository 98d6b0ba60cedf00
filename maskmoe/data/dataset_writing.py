"""Write datasets in Megatron-Core's indexed dataset format: from token ids, or joined from other datasets."""

import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from maskmoe.data.indexed_dataset import (
    CODE_OF_DTYPE,
    HEADER,
    MAGIC,
    VERSION,
    DatasetIndex,
    bin_path,
    dataset_files,
    idx_path,
    read_index,
    sequence_offsets,
)
from maskmoe.data.tokenizer_record import TokenizerRecord, read_tokenizer_record, tokenizer_record_path
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output

_BATCH_TOKENS = 1 << 20  # copied at a time
_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})(.*)", re.DOTALL)


def optimal_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that stores ids of a vocabulary, as Megatron-Core's `DType.optimal_dtype` does."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


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
            header = HEADER.pack(MAGIC, VERSION, CODE_OF_DTYPE[self.dtype.name], len(lengths), len(boundaries))
            with open(new_idx, "wb") as stream:
                for part in (header, lengths, sequence_offsets(lengths, self.dtype), boundaries):
                    stream.write(part)
            idx_path(prefix).unlink(missing_ok=True)
            if tokenizer is None:
                record_path.unlink(missing_ok=True)

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
        writer.add_sequences(index.map_tokens(), index.sequence_lengths, np.diff(index.document_indices))


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
        tokens.append(np.asarray(index.map_tokens()))
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


def _batches(lengths: np.ndarray) -> Iterator[range]:
    """Divide documents into ranges; a range ends after the document that fills up another million tokens.

    Args:
        lengths: Tokens in each document, integer [documents].
    """
    ends = np.flatnonzero(np.diff(np.cumsum(lengths) // _BATCH_TOKENS)) + 1
    yield from (range(*bounds) for bounds in pairwise([0, *ends.tolist(), len(lengths)]) if bounds[0] < bounds[1])


def merge_datasets(
    names: Sequence[str], output_prefix: str, shuffle_seed: int | None = None, force: bool = False
) -> IndexedDatasetWriter:
    """Join datasets in the given order.

    The result has the bytes of the dataset that `preprocess` makes of the whole text, if the datasets are its shards in
    order. A progress bar is shown if stderr is a terminal.

    Args:
        names: Prefixes of the datasets, with or without `.idx`.
        output_prefix: Prefix of the joined dataset.
        shuffle_seed: Seed of a random order of all documents. None keeps the order.
        force: Whether to replace an earlier dataset of this name.

    Returns:
        The writer, which tells the size of the joined dataset.

    Raises:
        UserError: A dataset is missing, damaged, or given twice; the datasets differ in tokenizer or dtype; other
            shards of a text are missing; or an output is an input, or exists and `force` is false. Then nothing is
            written.
    """
    prefixes = [name.removesuffix(".idx") for name in names]
    check_outputs(dataset_files(output_prefix), [path for prefix in prefixes for path in dataset_files(prefix)], force)
    _check_shards(prefixes)
    dtype, tokenizer = _check_datasets(prefixes, shuffle_seed is not None)
    with IndexedDatasetWriter(output_prefix, dtype, tokenizer) as writer:
        if shuffle_seed is None:
            copy_in_order(prefixes, writer)
        else:
            copy_shuffled(prefixes, writer, shuffle_seed)
        if writer.num_tokens == 0:
            raise UserError(f"the {len(prefixes)} datasets hold no tokens: there is nothing to train on")
    return writer


def _check_shards(prefixes: Sequence[str]) -> None:
    """Check that the shards of a text, see `Shard.prefix`, are complete. Raises UserError."""
    numbers_of_text: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for prefix in prefixes:
        if match := _SHARD.fullmatch(prefix):
            start, number, count, end = match.groups()
            numbers_of_text[start, count, end].add(int(number))
    for (start, count, end), numbers in numbers_of_text.items():
        if missing := sorted({*range(int(count))} - numbers):
            first = f"{start}-{missing[0]:05d}-of-{count}{end}"
            raise UserError(f"{len(missing)} of {int(count)} shards are missing, the first is {first}")


def _check_datasets(prefixes: Sequence[str], shuffled: bool) -> tuple[np.dtype, TokenizerRecord | None]:
    """Check that the datasets can be joined; return their dtype, and the record of their tokenizer or None."""
    paths = [idx_path(prefix).resolve() for prefix in prefixes]
    first, tokenizer = read_index(prefixes[0]), read_tokenizer_record(prefixes[0])
    for number, prefix in enumerate(prefixes):
        index, record = read_index(prefix), read_tokenizer_record(prefix)
        if paths[number] in paths[:number]:
            raise UserError(f"dataset {prefix} is given twice")
        if _has_modes(index):
            raise UserError(f"dataset {prefix} is multimodal, and cannot be joined")
        if shuffled and (np.diff(index.document_indices) > 1).any():
            raise UserError(f"dataset {prefix} has documents of several sequences, which cannot be shuffled")
        if index.dtype != first.dtype:
            raise UserError(f"datasets differ: {prefixes[0]} has {first.dtype} ids, {prefix} has {index.dtype} ids")
        if record is not tokenizer and not (record and record.is_same_as(tokenizer)):
            raise UserError(
                f"datasets differ in their tokenizers: {prefixes[0]} was made with {tokenizer or 'an unknown one'}, "
                f"{prefix} with {record or 'an unknown one'}"
            )
    return first.dtype, tokenizer


def _has_modes(index: DatasetIndex) -> bool:
    """Return whether the sequences of a dataset have modes, as in multimodal datasets."""
    num_integers = 12 * len(index.sequence_lengths) + 8 * len(index.document_indices)
    return idx_path(index.prefix).stat().st_size != HEADER.size + num_integers
