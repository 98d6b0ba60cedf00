"""Encode text into an indexed dataset with many processes; the result does not depend on their number.

The calling process reads raw blocks and writes token ids. Worker processes parse and encode. Only a bounded number of
blocks is in memory at a time, so memory does not grow with the input.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from maskmoe.data.dataset_writing import IndexedDatasetWriter, copy_shuffled, optimal_dtype
from maskmoe.data.documents import Block, progress_bar, read_blocks
from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.data.inputs import Input, Shard, find_inputs, take_shard
from maskmoe.data.parallel import map_in_processes
from maskmoe.data.tokenizer import Tokenizer, load_tokenizer
from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs


@dataclass(frozen=True)
class BlockEncoder:
    """Encodes blocks of text; each worker process gets a copy, and loads the tokenizer itself.

    Attributes:
        tokenizer: Record of the tokenizer.
        tokenizer_model: Path of the tokenizer's model.
        json_keys: Keys of JSON lines, or names of columns, whose texts are encoded. The texts of each key go to a
            dataset of their own.
        append_eod: Whether to end each document that has tokens with the end-of-document id.
    """

    tokenizer: TokenizerRecord
    tokenizer_model: str
    json_keys: tuple[str, ...]
    append_eod: bool

    def encode(self, block: Block) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode the documents of a block.

        Returns:
            For each key, the token ids of all documents, one document after the other, [tokens] in the dtype of the
            dataset; and the number of tokens in each document, int32 [documents].

        Raises:
            UserError: The block cannot be parsed, or the tokenizer returns an id outside its own vocabulary.
        """
        return [self._encode_texts(texts) for texts in block.documents(self.json_keys)]

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
    input_format: str | None = None,
    document_separator: str | None = None,
    shard: Shard | None = None,
) -> list[IndexedDatasetWriter]:
    """Encode text into one indexed dataset for each key, named `OUTPUT_PREFIX_KEY_document` as by Megatron.

    Each document is one sequence. A progress bar is shown if stderr is a terminal.

    Args:
        inputs: Names of files, pipes and saved datasets, see `maskmoe.data.inputs`.
        tokenizer_type: Type of the tokenizer, as in Megatron's `--tokenizer-type`.
        tokenizer_model: Path of the tokenizer, as in Megatron's `--tokenizer-model`.
        output_prefix: Start of the datasets' prefixes.
        json_keys: Keys of JSON lines, or names of columns, whose values are text.
        append_eod: Whether to end each document with the end-of-document id.
        workers: Number of processes that encode, or None for one process on each available core.
        shuffle_seed: Seed of a random order of the documents, the same for all keys. None keeps the order of the input.
            With a seed, the datasets take twice their space on disk while they are written.
        force: Whether to replace datasets of these names.
        input_format: See `find_inputs`.
        document_separator: See `find_inputs`.
        shard: The part of the inputs to encode. `Shard.prefix(output_prefix)` then replaces `output_prefix`, and a
            dataset may be empty.

    Returns:
        The writers, which tell the prefixes and the sizes of the datasets.

    Raises:
        UserError: The input is bad, keys cannot name files, a dataset exists and `force` is false, or the tokenizer has
            no end-of-text id in its vocabulary and `append_eod` is true. Then nothing is written, and earlier datasets
            of these names stay as they were.
    """
    sources = find_inputs(inputs, input_format, document_separator)
    if shard is not None and shuffle_seed is not None:
        raise UserError("--shuffle-seed shuffles whole datasets, not shards: give it to --merge instead")
    prefixes = _prefixes(output_prefix if shard is None else shard.prefix(output_prefix), json_keys)
    outputs = [path for prefix in prefixes for path in dataset_files(prefix)]
    check_outputs(outputs, [*inputs, *(source.path for source in sources), tokenizer_model], force)
    record = load_tokenizer(tokenizer_type, tokenizer_model).record()
    if append_eod:
        if record.eod_id is None:
            raise UserError(f"tokenizer {tokenizer_model} has no end-of-text token, which --append-eod needs")
        if record.eod_id >= record.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_model} has the end-of-text id {record.eod_id}, but only {record.vocab_size} "
                f"ids: renumber its tokens from 0 to {record.vocab_size - 1}, or leave out --append-eod"
            )
    encoder = BlockEncoder(record, str(tokenizer_model), tuple(json_keys), append_eod)
    dtype = optimal_dtype(record.vocab_size)
    writers = [IndexedDatasetWriter(prefix, dtype, record) for prefix in prefixes]
    if shard is not None:
        sources = take_shard(sources, shard)
    with ExitStack() as stack:
        for writer in writers:
            stack.enter_context(writer)
        if shuffle_seed is None:
            _encode_inputs(sources, encoder, writers, workers)
        else:
            # Write the documents in the order of the input to temporary datasets, then copy them in the random order.
            folder = stack.enter_context(TemporaryDirectory(dir=Path(prefixes[0]).parent, prefix=".unshuffled."))
            unshuffled = [IndexedDatasetWriter(Path(folder, str(number)), dtype) for number in range(len(writers))]
            with ExitStack() as temporary:
                for writer in unshuffled:
                    temporary.enter_context(writer)
                _encode_inputs(sources, encoder, unshuffled, workers)
            for source, writer in zip(unshuffled, writers, strict=True):
                copy_shuffled([source.prefix], writer, shuffle_seed)
        for key, writer in zip(json_keys, writers, strict=True):
            if writer.num_tokens == 0 and shard is None:
                raise UserError(f"no text under {key!r} in {', '.join(map(str, inputs))}: there is nothing to train on")
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


def _encode_inputs(
    sources: Sequence[Input], encoder: BlockEncoder, writers: Sequence[IndexedDatasetWriter], workers: int | None
) -> None:
    """Encode all documents of the inputs and append them to the writers, one for each key.

    Raises:
        UserError: An input is bad.
    """
    started = time.perf_counter()
    with progress_bar(sources, "encoding") as bar:
        blocks = read_blocks(sources, encoder.json_keys, bar)
        for encoded in map_in_processes(encoder.encode, blocks, workers):
            for writer, documents in zip(writers, encoded, strict=True):
                writer.add_documents(*documents)
            rate = sum(writer.num_tokens for writer in writers) / (time.perf_counter() - started)
            bar.set_postfix_str(f"{writers[0].num_documents} documents, {rate / 1e6:.2f}M tokens/s", refresh=False)
