"""Count the occurrences of each token id in Megatron's indexed datasets."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from tqdm import tqdm

from maskmoe.data.indexed_dataset import IndexedDatasetInfo, bin_path, read_info, read_tokenizer_record
from maskmoe.data.parallel import map_in_processes
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.routing_mask.records import check_fields, read_datasets, read_tokenizer
from maskmoe.routing_mask.sealed_tensors import content_digest, load_sealed, save_sealed

KIND = "token frequency"

# np.bincount casts its input to int64 first. A block of this length is 2 MiB after the cast and stays in the cache,
# which nearly doubles the speed.
_BLOCK_IDS = 1 << 18
_MIN_SPAN_BYTES = 64 << 20
_MAX_SPANS = 1024


@dataclass(frozen=True, eq=False)
class TokenFrequency:
    """Token counts of the datasets of a training blend, with records of these datasets and their tokenizer.

    Attributes:
        counts: Exact number of occurrences of each id in each dataset, int64 `[datasets, vocab]`.
        weights: The blend weight of each dataset as given, or None for each dataset of an unweighted blend.
        datasets: The `name`, `num_tokens`, `idx_sha256` and `bin_bytes` of each dataset.
        tokenizer: The tokenizer that made the datasets (see `TokenizerRecord`), or None if no dataset records one.
    """

    counts: np.ndarray
    weights: tuple[float | None, ...]
    datasets: tuple[dict[str, Any], ...]
    tokenizer: dict[str, Any] | None

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.counts.shape[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all datasets together."""
        return sum(dataset["num_tokens"] for dataset in self.datasets)

    @cached_property
    def occurrences(self) -> np.ndarray:
        """Expected occurrences of each id in a training stream of `num_tokens` tokens, float64 `[vocab]`.

        Without weights, these are the exact counts. With weights, Megatron normalises the weights and draws from each
        dataset in proportion to its weight, whatever the size of the dataset
        (`megatron.core.datasets.blended_dataset.BlendedDataset`).
        """
        if None in self.weights:
            return self.counts.sum(axis=0).astype(np.float64)
        weights = np.array(self.weights, np.float64)
        tokens = np.array([dataset["num_tokens"] for dataset in self.datasets])
        tokens_drawn = self.num_tokens * weights / weights.sum()
        return (tokens_drawn / tokens) @ self.counts

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of counts, weights, datasets and tokenizer."""
        return content_digest(self._tensors(), self._record())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the counts to a safetensors file atomically.

        Raises:
            UserError: `path` cannot be written.
        """
        save_sealed(path, KIND, self._tensors(), self._record())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenFrequency":
        """Read and verify a file written by `save`.

        Raises:
            UserError: The file is missing, damaged or altered, or is not a token frequency file.
        """
        tensors, record = load_sealed(path, KIND)
        try:
            check_fields(record, {"weights": list, "datasets": list, "tokenizer": (dict, type(None))})
            frequency = cls(
                tensors["counts"],
                tuple(record["weights"]),
                read_datasets(record["datasets"]),
                tokenizer=read_tokenizer(record["tokenizer"]),
            )
            consistent = frequency._is_consistent()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} lacks parts of a token frequency; count again") from error
        if not consistent:
            raise UserError(f"{path}: counts and datasets contradict each other; count again")
        return frequency

    def _is_consistent(self) -> bool:
        """Return whether counts, weights and datasets fit together."""
        counts, tokens = self.counts, [dataset["num_tokens"] for dataset in self.datasets]
        if counts.dtype != np.int64 or counts.ndim != 2 or 0 in counts.shape or len(self.weights) != len(counts):
            return False
        # The exact sums below are only valid if they fit int64; larger sums would wrap around.
        if (counts < 0).any() or counts.sum(axis=1, dtype=np.float64).max() >= 2.0**63:
            return False
        # The exact type is compared because a bool is an instance of int.
        is_blend = all(
            weight is not None and type(weight) in (int, float) and 0 < weight < math.inf for weight in self.weights
        )
        return counts.sum(axis=1).tolist() == tokens and (is_blend or set(self.weights) == {None})

    def _tensors(self) -> dict[str, np.ndarray]:
        return {"counts": self.counts}

    def _record(self) -> dict[str, Any]:
        return {"weights": list(self.weights), "datasets": list(self.datasets), "tokenizer": self.tokenizer}


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float | None]]:
    """Split Megatron's `--data-path` into dataset prefixes and blend weights; all weights are None if none is given.

    The rules are those of `megatron.core.datasets.utils.get_blend_from_list`. All items are prefixes if their number is
    odd or if no item at an even position is a number. Otherwise weights and prefixes alternate.

    Raises:
        UserError: `data_path` is empty, only some datasets have a weight, or a weight is not a positive number.
    """
    if not data_path:
        raise UserError("--data-path is empty; give PREFIX… or WEIGHT PREFIX …")
    prefixes = [item.strip() for item in data_path]
    weights = [_as_number(item) for item in prefixes[::2]]
    if len(prefixes) % 2 or all(weight is None for weight in weights):
        return prefixes, [None] * len(prefixes)
    for item, weight in zip(prefixes[::2], weights, strict=True):
        if weight is None:
            raise UserError(
                f"--data-path has weights for some datasets, but {item!r} stands where a weight is expected"
            )
        if not 0 < weight < float("inf"):
            raise UserError(f"--data-path: blend weight {item} is not a positive number")
    return prefixes[1::2], weights


def count_token_frequency(
    data_path: Sequence[str], vocab_size: int, workers: int | None = None, progress: bool = False
) -> TokenFrequency:
    """Count every token id in the datasets of `data_path`.

    Args:
        data_path: Megatron's `--data-path`: dataset prefixes, or alternating weights and prefixes.
        vocab_size: Number of ids of the tokenizer.
        workers: Number of processes that count. None uses one process on each available core, or only the calling
            process if the datasets are small.
        progress: Whether to show a progress bar in bytes on stderr if counting takes more than half a second.

    Raises:
        UserError: A dataset is missing, truncated or empty, or holds an id outside `[0, vocab_size)`; or the recorded
            tokenizers of the datasets differ from each other or have another number of ids than `vocab_size`.
    """
    if vocab_size < 1:
        raise UserError(f"--vocab-size must be at least 1, not {vocab_size}")
    prefixes, weights = parse_data_path(data_path)
    infos = [read_info(prefix) for prefix in prefixes]
    for prefix, info in zip(prefixes, infos, strict=True):
        if info.num_tokens == 0:
            raise UserError(f"dataset {prefix} holds no tokens; leave it out of --data-path")
    # Divide the datasets into spans, count each span, and add up the counts of each dataset.
    tokenizer = _common_tokenizer(prefixes, vocab_size)
    spans = _split_into_spans(prefixes, infos, vocab_size)
    counts = np.zeros((len(prefixes), vocab_size), dtype=np.int64)
    total_bytes = sum(info.bin_bytes for info in infos)
    if workers is None and total_bytes < _MIN_SPAN_BYTES:
        workers = 1
    span_counts = map_in_processes(_count_span, spans, workers)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="counting", delay=0.5, disable=not progress) as bar:
        for span, counts_of_span in zip(spans, span_counts, strict=True):
            counts[span.dataset] += counts_of_span
            bar.update(span.num_bytes)
    datasets = tuple(
        {
            "name": os.path.basename(prefix),
            "num_tokens": info.num_tokens,
            "idx_sha256": info.idx_sha256,
            "bin_bytes": info.bin_bytes,
        }
        for prefix, info in zip(prefixes, infos, strict=True)
    )
    return TokenFrequency(counts, tuple(weights), datasets, tokenizer)


@dataclass(frozen=True)
class _Span:
    """Consecutive tokens of one dataset, counted by one task.

    Attributes:
        dataset: Index of the dataset.
        prefix: Prefix of the dataset.
        dtype: Dtype of the token ids.
        first: Position of the first token in the dataset.
        num_tokens: Number of tokens.
        vocab_size: Number of ids of the tokenizer.
    """

    dataset: int
    prefix: str
    dtype: np.dtype
    first: int
    num_tokens: int
    vocab_size: int

    @property
    def num_bytes(self) -> int:
        return self.num_tokens * self.dtype.itemsize


def _split_into_spans(prefixes: Sequence[str], infos: Sequence[IndexedDatasetInfo], vocab_size: int) -> list[_Span]:
    """Divide all datasets into spans: many for an even load and a smooth bar, but few enough to bound the overhead."""
    span_bytes = max(_MIN_SPAN_BYTES, sum(info.bin_bytes for info in infos) // _MAX_SPANS)
    spans = []
    for dataset, (prefix, info) in enumerate(zip(prefixes, infos, strict=True)):
        step = span_bytes // info.dtype.itemsize
        for first in range(0, info.num_tokens, step):
            num_tokens = min(step, info.num_tokens - first)
            spans.append(_Span(dataset, prefix, info.dtype, first, num_tokens, vocab_size))
    return spans


def _count_span(span: _Span) -> np.ndarray:
    """Count the ids of a span; returns int64 `[vocab]`.

    Raises:
        UserError: An id is outside the vocabulary.
    """
    offset = span.first * span.dtype.itemsize
    ids = np.asarray(np.memmap(bin_path(span.prefix), span.dtype, mode="r", offset=offset, shape=(span.num_tokens,)))
    # As an unsigned number, a negative id is a large number, so one comparison finds both kinds of bad id.
    unsigned_ids = ids.view(f"u{span.dtype.itemsize}")
    counts = np.zeros(span.vocab_size, dtype=np.int64)
    for start in range(0, len(ids), _BLOCK_IDS):
        block = slice(start, start + _BLOCK_IDS)
        if unsigned_ids[block].max() >= span.vocab_size:
            position = start + int(np.argmax(unsigned_ids[block] >= span.vocab_size))
            raise UserError(
                f"dataset {span.prefix}: token {span.first + position} has id {ids[position]}, outside the vocabulary "
                f"of {span.vocab_size} ids; give the --vocab-size of the tokenizer that made the dataset"
            )
        counts += np.bincount(ids[block], minlength=span.vocab_size)
    return counts


def _common_tokenizer(prefixes: Sequence[str], vocab_size: int) -> dict[str, Any] | None:
    """Return the tokenizer that all datasets with a tokenizer record share, or None if no dataset has a record.

    Raises:
        UserError: The tokenizers differ, or have another number of ids than `vocab_size`.
    """
    records = {prefix: record for prefix in prefixes if (record := read_tokenizer_record(prefix)) is not None}
    if not records:
        return None
    (first_prefix, first), *others = records.items()
    for prefix, record in others:
        # Tokenizers are equal if they differ in the names of their files only.
        if replace(record, model=first.model) != first:
            raise UserError(
                f"datasets were made with different tokenizers: {first_prefix} with {_describe(first)}, "
                f"{prefix} with {_describe(record)}; blend only datasets of one tokenizer"
            )
    if first.vocab_size != vocab_size:
        raise UserError(
            f"--vocab-size is {vocab_size}, but dataset {first_prefix} was made with {_describe(first)}; "
            f"give --vocab-size {first.vocab_size}"
        )
    return asdict(first)


def _describe(record: TokenizerRecord) -> str:
    return f"{record.type} {record.model} ({record.vocab_size} ids, sha256 {record.sha256[:12]})"


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
