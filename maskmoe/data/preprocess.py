"""Text files to an indexed dataset, by many processes, with the same bytes whatever their number.

The calling process reads raw blocks and writes token ids; workers parse and encode. Only a bounded number of blocks is
under way at a time, so memory does not grow with the input.
"""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.data.corpus import BLOCK_BYTES, Block, check_inputs, parse_block, read_blocks
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from maskmoe.data.tokenizer import Tokenizer, load_tokenizer
from maskmoe.errors import UserError

_TASKS_PER_WORKER = 16


@dataclass(frozen=True)
class EncodedDocuments:
    """Token ids of some documents: `tokens` [tokens], one document after the other, and `lengths` int32 [documents]."""

    tokens: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class DatasetSummary:
    """One written dataset: its prefix, how much is in it, and how long it took to make."""

    prefix: str
    num_documents: int
    num_tokens: int
    seconds: float


class BlockEncoder:
    """Encodes blocks of text with one tokenizer.

    Args:
        tokenizer: gives the ids.
        json_keys: keys of JSON lines whose texts are encoded, each into a dataset of its own.
        append_eod: end each document that has tokens with the tokenizer's end-of-document id.
    """

    def __init__(self, tokenizer: Tokenizer, json_keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self.json_keys = json_keys
        self.append_eod = append_eod
        self.dtype = optimal_dtype(tokenizer.vocab_size)

    def encode(self, blocks: Sequence[Block]) -> list[EncodedDocuments]:
        """Encode the blocks' documents, one result a key.

        Raises:
            UserError: as `parse_block`, or the tokenizer gives an id outside its own vocabulary.
        """
        columns = zip(*(parse_block(block, self.json_keys) for block in blocks), strict=True)
        return [self._encode_documents([text for texts in column for text in texts]) for column in columns]

    def _encode_documents(self, texts: list[str]) -> EncodedDocuments:
        ids_of_texts = self.tokenizer.encode_batch(texts)
        lengths = np.array([len(ids) for ids in ids_of_texts], np.int32)
        tokens = np.concatenate(ids_of_texts) if ids_of_texts else np.empty(0, np.int32)
        if tokens.size and tokens.max() >= self.tokenizer.vocab_size:
            model, vocab_size = self.tokenizer.model_path, self.tokenizer.vocab_size
            raise UserError(f"tokenizer {model} gave id {tokens.max()}, but has only {vocab_size} ids")
        tokens = tokens.astype(self.dtype)
        if self.append_eod:
            has_tokens = lengths > 0
            tokens = np.insert(tokens, np.cumsum(lengths)[has_tokens], self.tokenizer.eod_id)
            lengths += has_tokens
        return EncodedDocuments(tokens, lengths)


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_type: str,
    tokenizer_model: str | Path,
    output_prefix: str | Path,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
) -> list[DatasetSummary]:
    """Encode text files into one indexed dataset a key, `OUTPUT_PREFIX_KEY_document`, as Megatron's tool names it.

    Each document is one sequence, in the order of the input. A progress bar is shown where stderr is a terminal.

    Args:
        inputs: text files, see `maskmoe.data.corpus`.
        tokenizer_type, tokenizer_model: as Megatron's flags of these names.
        output_prefix: begin of the datasets' prefixes.
        json_keys: which values of each JSON line are text.
        append_eod: end each document with the end-of-document id.
        workers: processes that encode.

    Raises:
        UserError: bad input. Then nothing is written, and earlier datasets of these names stay as they were.
    """
    started = time.perf_counter()
    paths = check_inputs(inputs)
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    if append_eod and tokenizer.eod_id is None:
        raise UserError(f"tokenizer {tokenizer.model_path} has no end-of-text token, which --append-eod needs")
    prefixes = [f"{output_prefix}_{key}_document" for key in json_keys]
    num_documents, num_tokens = 0, np.zeros(len(prefixes), np.int64)
    with ExitStack() as stack:
        record, dtype = tokenizer.record(), optimal_dtype(tokenizer.vocab_size)
        writers = [stack.enter_context(IndexedDatasetWriter(prefix, dtype, record)) for prefix in prefixes]
        total_bytes = sum(path.stat().st_size for path in paths)
        bar = stack.enter_context(tqdm(total=total_bytes, unit="B", unit_scale=True, desc="encoding", disable=None))
        tasks = _batch_blocks(_advance(bar, read_blocks(paths)))
        arguments = (tokenizer_type, str(tokenizer_model), tuple(json_keys), append_eod)
        for encoded in ordered_map(_encode, tasks, workers, _start_worker, arguments):
            for writer, documents in zip(writers, encoded, strict=True):
                writer.add_documents(documents.tokens, documents.lengths)
            num_documents += len(encoded[0].lengths)
            num_tokens += [len(documents.tokens) for documents in encoded]
            rate = num_tokens.sum() / (time.perf_counter() - started)
            bar.set_postfix_str(f"{num_documents} documents, {rate / 1e6:.2f}M tokens/s", refresh=False)
        for key, tokens in zip(json_keys, num_tokens, strict=True):
            if tokens == 0:
                raise UserError(f"no text under {key!r} in {', '.join(map(str, paths))}: there is nothing to train on")
    seconds = time.perf_counter() - started
    return [
        DatasetSummary(prefix, num_documents, int(tokens), seconds)
        for prefix, tokens in zip(prefixes, num_tokens, strict=True)
    ]


def ordered_map[Task, Result](
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    start_worker: Callable[..., None],
    arguments: tuple,
) -> Iterator[Result]:
    """`map(function, tasks)` by several processes: results in the order of the tasks, a few tasks ahead of the caller.

    Each process first calls `start_worker(*arguments)`. With one worker all is done in the calling process.
    """
    if workers == 1:
        start_worker(*arguments)
        yield from map(function, tasks)
        return
    # Fresh processes: forking one that may hold the tokenizer library's threads is not safe.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, context, _start_process, (start_worker, *arguments))
    under_way = deque()
    try:
        for task in tasks:
            under_way.append(pool.submit(function, task))
            if len(under_way) >= workers * _TASKS_PER_WORKER:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_process(start_worker: Callable[..., None], *arguments: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process handles Ctrl-C for all
    start_worker(*arguments)


_encoder: BlockEncoder  # of this worker process


def _start_worker(tokenizer_type: str, tokenizer_model: str, json_keys: tuple[str, ...], append_eod: bool) -> None:
    global _encoder
    _encoder = BlockEncoder(load_tokenizer(tokenizer_type, tokenizer_model), json_keys, append_eod)


def _encode(blocks: Sequence[Block]) -> list[EncodedDocuments]:
    return _encoder.encode(blocks)


def _advance(bar: tqdm, blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        bar.update(block.file_bytes)
        yield block


def _batch_blocks(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    """Join small blocks, so that a task is worth sending to another process."""
    batch, size = [], 0
    for block in blocks:
        batch.append(block)
        size += len(block.data)
        if size >= BLOCK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
