"""Encode text files into an indexed dataset with many processes; the result does not depend on their number.

The calling process reads raw blocks and writes token ids. Worker processes parse and encode. Only a bounded number of
blocks is in memory at a time, so memory does not grow with the input.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from maskmoe.data.corpus import BLOCK_BYTES, Block, check_inputs, parse_block, progress_bar, read_blocks
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, copy_shuffled, dataset_files, optimal_dtype
from maskmoe.data.parallel import map_in_processes
from maskmoe.data.tokenizer import Tokenizer, TokenizerRecord, load_tokenizer
from maskmoe.errors import UserError
from maskmoe.outputs import check_outputs


@dataclass(frozen=True)
class BlockEncoder:
    """Encodes blocks of text; each worker process gets a copy, and loads the tokenizer itself.

    Attributes:
        tokenizer: Record of the tokenizer.
        tokenizer_model: Path of the tokenizer's model.
        json_keys: Keys of JSON lines whose texts are encoded. The texts of each key go to a dataset of their own.
        append_eod: Whether to end each document that has tokens with the end-of-document id.
    """

    tokenizer: TokenizerRecord
    tokenizer_model: str
    json_keys: tuple[str, ...]
    append_eod: bool

    def encode(self, blocks: Sequence[Block]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode the documents of all blocks.

        Returns:
            For each key, the token ids of all documents, one document after the other, [tokens] in the dtype of the
            dataset; and the number of tokens in each document, int32 [documents].

        Raises:
            UserError: A block cannot be parsed, see `parse_block`, or the tokenizer returns an id outside its own
                vocabulary.
        """
        columns = zip(*(parse_block(block, self.json_keys) for block in blocks), strict=True)
        return [self._encode_texts([text for texts in column for text in texts]) for column in columns]

    def _encode_texts(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids_of_texts = _load_once(self.tokenizer, self.tokenizer_model).encode_batch(texts)
        lengths = np.array([len(ids) for ids in ids_of_texts], np.int32)
        tokens = np.concatenate(ids_of_texts) if ids_of_texts else np.empty(0, np.int32)
        vocab_size, eod_id = self.tokenizer.vocab_size, self.tokenizer.eod_id
        if tokens.size and tokens.max() >= vocab_size:
            raise UserError(f"tokenizer {self.tokenizer_model} returned id {tokens.max()}, but has {vocab_size} ids")
        tokens = tokens.astype(optimal_dtype(vocab_size))
        if self.append_eod and eod_id is not None:
            has_tokens = lengths > 0
            tokens = np.insert(tokens, np.cumsum(lengths)[has_tokens], eod_id)
            lengths += has_tokens
        return tokens, lengths


@lru_cache(maxsize=1)
def _load_once(record: TokenizerRecord, model: str) -> Tokenizer:
    """Load a tokenizer once in each process; the record identifies its content."""
    return load_tokenizer(record.type, model)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_type: str,
    tokenizer_model: str | Path,
    output_prefix: str | Path,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int | None = 1,
    shuffle_seed: int | None = None,
    force: bool = False,
) -> list[IndexedDatasetWriter]:
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
        force: Whether to replace datasets of these names.

    Returns:
        The writers, which tell the prefixes and the sizes of the datasets.

    Raises:
        UserError: The input is bad, keys cannot name files, or a dataset exists and `force` is false. Then nothing is
            written, and earlier datasets of these names stay as they were.
    """
    paths, prefixes = check_inputs(inputs), _prefixes(output_prefix, json_keys)
    outputs = [path for prefix in prefixes for path in dataset_files(prefix)]
    check_outputs(outputs, [*paths, tokenizer_model], force)
    record = load_tokenizer(tokenizer_type, tokenizer_model).record()
    if append_eod and record.eod_id is None:
        raise UserError(f"tokenizer {tokenizer_model} has no end-of-text token, which --append-eod needs")
    encoder = BlockEncoder(record, str(tokenizer_model), tuple(json_keys), append_eod)
    dtype = optimal_dtype(record.vocab_size)
    writers = [IndexedDatasetWriter(prefix, dtype, record) for prefix in prefixes]
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        if shuffle_seed is None:
            _encode_files(paths, encoder, writers, workers)
        else:
            # Write the documents in the order of the input to temporary datasets, then copy them in the random order.
            folder = stack.enter_context(TemporaryDirectory(dir=Path(output_prefix).parent, prefix=".unshuffled."))
            unshuffled = [IndexedDatasetWriter(Path(folder, str(number)), dtype) for number in range(len(writers))]
            with ExitStack() as temporary:
                for writer in unshuffled:
                    temporary.enter_context(writer)
                _encode_files(paths, encoder, unshuffled, workers)
            for source, writer in zip(unshuffled, writers, strict=True):
                copy_shuffled(source.prefix, writer, shuffle_seed)
    return writers


def _prefixes(output_prefix: str | Path, json_keys: Sequence[str]) -> list[str]:
    """Return the prefix of the dataset of each key.

    Raises:
        UserError: A key is given twice, or contains a slash, so that its dataset would lie in another folder.
    """
    for number, key in enumerate(json_keys):
        if key in json_keys[:number]:
            raise UserError(f"--json-keys names {key!r} twice; name each key once")
        if "/" in key or "\0" in key:
            raise UserError(f"--json-keys {key!r}: a key becomes part of a file's name, and must not contain '/'")
    return [f"{output_prefix}_{key}_document" for key in json_keys]


def _encode_files(
    paths: Sequence[Path], encoder: BlockEncoder, writers: Sequence[IndexedDatasetWriter], workers: int | None
) -> None:
    """Encode all documents of the files and append them to the writers, one for each key.

    Raises:
        UserError: A file is bad, or there are no tokens under a key.
    """
    started = time.perf_counter()
    with progress_bar(paths, "encoding") as bar:
        for encoded in map_in_processes(encoder.encode, _batch_blocks(read_blocks(paths, bar)), workers):
            for writer, documents in zip(writers, encoded, strict=True):
                writer.add_documents(*documents)
            rate = sum(writer.num_tokens for writer in writers) / (time.perf_counter() - started)
            bar.set_postfix_str(f"{writers[0].num_documents} documents, {rate / 1e6:.2f}M tokens/s", refresh=False)
    for key, writer in zip(encoder.json_keys, writers, strict=True):
        if writer.num_tokens == 0:
            raise UserError(f"no text under {key!r} in {', '.join(map(str, paths))}: there is nothing to train on")


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
