"""Encode text files into an indexed dataset with many processes; the result does not depend on their number.

The calling process reads raw blocks and writes token ids. Worker processes parse and encode. Only a bounded number of
blocks is in memory at a time, so memory does not grow with the input.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tqdm import tqdm

from maskmoe.data.corpus import BLOCK_BYTES, Block, check_inputs, parse_block, read_blocks
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from maskmoe.data.parallel import map_in_processes
from maskmoe.data.shuffling import copy_shuffled
from maskmoe.data.tokenizer import Tokenizer, TokenizerRecord, load_tokenizer
from maskmoe.errors import UserError


@dataclass(frozen=True)
class EncodedDocuments:
    """Token ids of several documents.

    Attributes:
        tokens: Ids of all documents, one document after the other, [tokens] in the dtype of the dataset.
        lengths: Tokens in each document, int32 [documents].
    """

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class DatasetSummary:
    """Size of a written dataset.

    Attributes:
        prefix: Path of the dataset's files without their suffixes.
        num_documents: Number of documents, including empty ones.
        num_tokens: Number of tokens.
        seconds: Time from the start of `preprocess` to its end.
    """

    prefix: str
    num_documents: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class EncoderSettings:
    """Everything that a worker process needs to make a `BlockEncoder`.

    Attributes:
        tokenizer: Record of the tokenizer.
        tokenizer_model: Path of the tokenizer's model.
        json_keys: Keys of JSON lines whose texts are encoded.
        append_eod: Whether to end each document with the end-of-document id.
    """

    tokenizer: TokenizerRecord
    tokenizer_model: str
    json_keys: tuple[str, ...]
    append_eod: bool


class BlockEncoder:
    """Encodes blocks of text with one tokenizer.

    Args:
        tokenizer: The tokenizer.
        json_keys: Keys of JSON lines whose texts are encoded. The texts of each key go to a dataset of their own.
        append_eod: Whether to end each document that has tokens with the end-of-document id.

    Raises:
        UserError: `append_eod` is set, but the tokenizer has no end-of-document id.
    """

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        if append_eod and tokenizer.eod_id is None:
            raise UserError(f"tokenizer {tokenizer.model_path} has no end-of-text token, which --append-eod needs")
        self._tokenizer = tokenizer
        self._json_keys = json_keys
        self._eod_id = tokenizer.eod_id if append_eod else None
        self._dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, blocks: Sequence[Block]) -> list[EncodedDocuments]:
        """Encode the documents of all blocks; returns one result for each key.

        Raises:
            UserError: A block cannot be parsed, see `parse_block`, or the tokenizer returns an id outside its own
                vocabulary.
        """
        columns = zip(*(parse_block(block, self._json_keys) for block in blocks), strict=True)
        return [self._encode_documents([text for texts in column for text in texts]) for column in columns]

    def _encode_documents(self, texts: list[str]) -> EncodedDocuments:
        ids_of_texts = self._tokenizer.encode_batch(texts)
        lengths = np.array([len(ids) for ids in ids_of_texts], np.int32)
        tokens = np.concatenate(ids_of_texts) if ids_of_texts else np.empty(0, np.int32)
        if tokens.size and tokens.max() >= self._tokenizer.vocab_size:
            model, vocab_size = self._tokenizer.model_path, self._tokenizer.vocab_size
            raise UserError(f"tokenizer {model} returned id {tokens.max()}, but has only {vocab_size} ids")
        tokens = tokens.astype(self._dtype)
        if self._eod_id is not None:
            has_tokens = lengths > 0
            tokens = np.insert(tokens, np.cumsum(lengths)[has_tokens], self._eod_id)
            lengths += has_tokens
        return EncodedDocuments(tokens, lengths)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_type: str,
    tokenizer_model: str | Path,
    output_prefix: str | Path,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int | None = 1,
    shuffle_seed: int | None = None,
) -> list[DatasetSummary]:
    """Encode text files into one indexed dataset for each key, named `OUTPUT_PREFIX_KEY_document` as by Megatron.

    Each document is one sequence. A progress bar is shown if stderr is a terminal.

    Args:
        inputs: Text files, see `maskmoe.data.corpus`.
        tokenizer_type: Type of the tokenizer, as in Megatron's `--tokenizer-type`.
        tokenizer_model: Path of the tokenizer, as in Megatron's `--tokenizer-model`.
        output_prefix: Start of the datasets' prefixes.
        json_keys: Keys of JSON lines whose values are text.
        append_eod: Whether to end each document with the end-of-document id.
        workers: Number of processes that encode, or None for one process on each available core.
        shuffle_seed: Seed of a random order of the documents, the same for all keys. None keeps the order of the input.
            With a seed, the datasets take twice their space on disk while they are written.

    Raises:
        UserError: The input is bad. Then nothing is written, and earlier datasets of these names stay as they were.
    """
    started = time.perf_counter()
    paths = check_inputs(inputs)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    BlockEncoder(tokenizer, json_keys, append_eod)  # reports bad settings before anything is written
    settings = EncoderSettings(tokenizer.record(), str(tokenizer_model), tuple(json_keys), append_eod)
    prefixes = [f"{output_prefix}_{key}_document" for key in json_keys]
    with ExitStack() as stack:
        dtype = optimal_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype, settings.tokenizer)) for prefix in prefixes]
        if shuffle_seed is None:
            num_documents, num_tokens = _encode_files(paths, settings, writers, workers)
        else:
            # Write the documents in the order of the input to temporary datasets, then copy them in the random order.
            folder = Path(
                stack.enter_context(TemporaryDirectory(dir=Path(output_prefix).parent, prefix=".unshuffled."))
            )
            unshuffled = [folder / str(number) for number in range(len(prefixes))]
            with ExitStack() as temporary:
                in_order = [temporary.enter_context(IndexedDatasetWriter(prefix, dtype)) for prefix in unshuffled]
                num_documents, num_tokens = _encode_files(paths, settings, in_order, workers)
            for prefix, writer in zip(unshuffled, writers, strict=True):
                copy_shuffled(prefix, writer, shuffle_seed)
    seconds = time.perf_counter() - started
    return [
        DatasetSummary(prefix, num_documents, tokens, seconds)
        for prefix, tokens in zip(prefixes, num_tokens, strict=True)
    ]


def _encode_files(
    paths: Sequence[Path], settings: EncoderSettings, writers: Sequence[IndexedDatasetWriter], workers: int | None
) -> tuple[int, list[int]]:
    """Encode all documents of the files and append them to the writers, one for each key.

    Returns:
        The number of documents, and the number of tokens under each key.

    Raises:
        UserError: A file is bad, or there are no tokens under a key.
    """
    started = time.perf_counter()
    num_documents, num_tokens = 0, [0] * len(writers)
    total_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=None) as bar:
        tasks = _batch_blocks(_advance(bar, read_blocks(paths)))
        for encoded in map_in_processes(partial(_encode, settings), tasks, workers):
            for number, (writer, documents) in enumerate(zip(writers, encoded, strict=True)):
                writer.add_documents(documents.tokens, documents.lengths)
                num_tokens[number] += len(documents.tokens)
            num_documents += len(encoded[0].lengths)
            rate = sum(num_tokens) / (time.perf_counter() - started)
            bar.set_postfix_str(f"{num_documents} documents, {rate / 1e6:.2f}M tokens/s", refresh=False)
    for key, tokens in zip(settings.json_keys, num_tokens, strict=True):
        if tokens == 0:
            raise UserError(f"no text under {key!r} in {', '.join(map(str, paths))}: there is nothing to train on")
    return num_documents, num_tokens


@lru_cache(maxsize=1)
def _encoder(settings: EncoderSettings) -> BlockEncoder:
    """Load the encoder once in each worker process; the settings identify the tokenizer by its content."""
    tokenizer = load_tokenizer(settings.tokenizer.type, settings.tokenizer_model)
    return BlockEncoder(tokenizer, settings.json_keys, settings.append_eod)


def _encode(settings: EncoderSettings, blocks: Sequence[Block]) -> list[EncodedDocuments]:
    return _encoder(settings).encode(blocks)


def _advance(bar: tqdm, blocks: Iterable[Block]) -> Iterator[Block]:
    """Yield the blocks and move the progress bar by the bytes that were read for each."""
    for block in blocks:
        bar.update(block.file_bytes)
        yield block


def _batch_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Join small blocks into batches that are large enough to be worth sending to another process."""
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.data)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
