"""Count the occurrences of each token id in Megatron's indexed datasets, and group the ids by their frequency."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field
from tqdm import tqdm

from maskmoe.data.data_path import parse_data_path
from maskmoe.data.indexed_dataset import bin_path, read_index
from maskmoe.data.parallel import map_in_processes
from maskmoe.data.tokenizer_record import TokenizerRecord, read_tokenizer_record
from maskmoe.errors import UserError
from maskmoe.files.parsing import printable_name
from maskmoe.routing_mask.mask import CountedDataset, RoutingMask, unpack_bits
from maskmoe.routing_mask.sealed_tensors import SealedTensors

# np.bincount casts its input to int64 first. A block of this length is 2 MiB after the cast and stays in the cache,
# which nearly doubles the speed.
_BLOCK_IDS = 1 << 18
_MIN_SPAN_BYTES = 64 << 20
_MAX_SPANS = 1024


@dataclass(frozen=True, eq=False)
class TokenFrequency(SealedTensors):
    """Token counts of the datasets of a training blend, with records of these datasets and their tokenizer.

    Attributes:
        counts: Exact number of occurrences of each id in each dataset, int64 `[datasets, vocab]`.
        weights: The blend weight of each dataset as given, or None for each dataset of an unweighted blend.
        datasets: The counted datasets.
        tokenizer: The tokenizer that made the datasets, or None if no dataset records one.

    Raises:
        UserError: Counts, weights and datasets contradict each other.
    """

    KIND = "token frequency"

    counts: np.ndarray
    weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)] | None, ...]
    datasets: tuple[CountedDataset, ...]
    tokenizer: TokenizerRecord | None

    def __post_init__(self) -> None:
        counts, tokens = self.counts, [dataset["num_tokens"] for dataset in self.datasets]
        are_counts = counts.dtype == np.int64 and counts.ndim == 2 and 0 not in counts.shape and counts.min() >= 0
        # Larger sums of int64 would wrap around silently.
        sums_fit = are_counts and counts.sum(axis=1, dtype=np.float64).max() < 2.0**63
        weights_fit = len(self.weights) == len(tokens) and (None not in self.weights or set(self.weights) == {None})
        if not (sums_fit and weights_fit and counts.sum(axis=1).tolist() == tokens):
            raise UserError("counts and datasets contradict each other; count again")

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
        # Row by row, since a matrix product rounds otherwise in other columns and on other processors: ids with equal
        # counts must have equal occurrences.
        occurrences = np.zeros(self.vocab_size)
        for scale, counts in zip(tokens_drawn / tokens, self.counts, strict=True):
            occurrences += scale * counts
        return occurrences


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
    prefixes, weights = parse_data_path(data_path)
    datasets: list[CountedDataset] = []
    dtypes: list[np.dtype] = []
    for prefix in prefixes:
        index = read_index(prefix)  # keeps a file open, so keep only what is needed of the index
        if index.num_tokens == 0:
            raise UserError(f"dataset {prefix} holds no tokens; leave it out of --data-path")
        datasets.append(
            CountedDataset(
                name=printable_name(prefix),
                num_tokens=index.num_tokens,
                idx_sha256=index.idx_sha256,
                bin_bytes=index.bin_bytes,
            )
        )
        dtypes.append(index.dtype)
    tokenizer = _common_tokenizer({prefix: read_tokenizer_record(prefix) for prefix in prefixes}, vocab_size)

    # Divide the datasets into spans: many for an even load and a smooth bar, but few enough to bound the overhead.
    total_bytes = sum(dataset["bin_bytes"] for dataset in datasets)
    span_bytes = max(_MIN_SPAN_BYTES, total_bytes // _MAX_SPANS)
    spans = []
    for number, (prefix, dataset, dtype) in enumerate(zip(prefixes, datasets, dtypes, strict=True)):
        num_tokens, step = dataset["num_tokens"], span_bytes // dtype.itemsize
        for first in range(0, num_tokens, step):
            spans.append(_Span(number, prefix, dtype, first, min(step, num_tokens - first)))

    # Count each span, and add up the counts of each dataset.
    counts = np.zeros((len(prefixes), vocab_size), dtype=np.int64)
    if workers is None and total_bytes < _MIN_SPAN_BYTES:
        workers = 1
    span_counts = map_in_processes(partial(_count_span, vocab_size), spans, workers)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="counting", delay=0.5, disable=not progress) as bar:
        for span, counts_of_span in zip(spans, span_counts, strict=True):
            counts[span.dataset] += counts_of_span
            bar.update(span.num_tokens * span.dtype.itemsize)
    return TokenFrequency(counts, tuple(weights), tuple(datasets), tokenizer)


class _Span(NamedTuple):
    """Consecutive tokens of one dataset, counted by one task.

    Attributes:
        dataset: Number of the dataset in the blend.
        prefix: Prefix of the dataset.
        dtype: Dtype of the token ids.
        first: Position of the first token in the dataset.
        num_tokens: Number of tokens.
    """

    dataset: int
    prefix: str
    dtype: np.dtype
    first: int
    num_tokens: int


def _count_span(vocab_size: int, span: _Span) -> np.ndarray:
    """Count the ids of a span; returns int64 `[vocab]`.

    Raises:
        UserError: An id is outside the vocabulary.
    """
    offset = span.first * span.dtype.itemsize
    ids = np.asarray(np.memmap(bin_path(span.prefix), span.dtype, mode="r", offset=offset, shape=(span.num_tokens,)))
    # As an unsigned number, a negative id is a large number, so one comparison finds both kinds of bad id.
    unsigned_ids = ids.view(f"u{span.dtype.itemsize}")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(ids), _BLOCK_IDS):
        block = slice(start, start + _BLOCK_IDS)
        if unsigned_ids[block].max() >= vocab_size:
            position = start + int(np.argmax(unsigned_ids[block] >= vocab_size))
            raise UserError(
                f"dataset {span.prefix}: token {span.first + position} has id {ids[position]}, outside the vocabulary "
                f"of {vocab_size} ids; give the --vocab-size of the tokenizer that made the dataset"
            )
        counts += np.bincount(ids[block], minlength=vocab_size)
    return counts


def _common_tokenizer(records: Mapping[str, TokenizerRecord | None], vocab_size: int) -> TokenizerRecord | None:
    """Return the tokenizer that all datasets share, or None if no dataset has a record of its tokenizer.

    The names of the tokenizers' files may differ.

    Args:
        records: The record of each dataset or file of counts.
        vocab_size: Number of ids that were counted.

    Raises:
        UserError: The tokenizers differ, or have another number of ids.
    """
    known = {name: record for name, record in records.items() if record is not None}
    if not known:
        return None
    first_name, first = next(iter(known.items()))
    for name, record in known.items():
        if not record.is_same_as(first):
            raise UserError(
                f"the datasets were made with different tokenizers: {first_name} with {first}, {name} with {record}; "
                "blend only datasets of one tokenizer"
            )
    if first.vocab_size != vocab_size:
        raise UserError(
            f"--vocab-size is {vocab_size}, but dataset {first_name} was made with {first}; "
            f"give --vocab-size {first.vocab_size}"
        )
    return first


def merge_token_frequencies(paths: Sequence[str | Path]) -> TokenFrequency:
    """Add up the counts of several files, as if `count_token_frequency` had counted all their datasets together.

    Raises:
        UserError: A file cannot be read; the files differ in tokenizer or number of ids; a dataset is in two files; or
            a file has blend weights, which are relative to its own datasets only.
    """
    parts = {str(path): TokenFrequency.load(path) for path in paths}
    if len(parts) < len(paths):
        raise UserError("--merge names a file of counts twice")
    (first_path, first), *_ = parts.items()
    seen: dict[tuple, str] = {}
    for path, part in parts.items():
        if part.vocab_size != first.vocab_size:
            raise UserError(f"counts differ: {first_path} has {first.vocab_size} ids, {path} has {part.vocab_size} ids")
        if None not in part.weights:
            raise UserError(
                f"{path} has blend weights, which hold among its own datasets only: count the whole blend at once, "
                "with --data-path WEIGHT PREFIX …"
            )
        for dataset, counts in zip(part.datasets, part.counts, strict=True):
            other = seen.setdefault((*dataset.values(), counts.tobytes()), path)
            if other != path:
                raise UserError(f"dataset {dataset['name']} is counted in {other} and in {path}; leave one of them out")
    datasets = tuple(dataset for part in parts.values() for dataset in part.datasets)
    return TokenFrequency(
        np.concatenate([part.counts for part in parts.values()]),
        (None,) * len(datasets),
        datasets,
        _common_tokenizer({path: part.tokenizer for path, part in parts.items()}, first.vocab_size),
    )


def ids_by_frequency(occurrences: np.ndarray) -> np.ndarray:
    """Return the ids by descending `occurrences` `[vocab]`, ties by ascending id; int64 `[vocab]`."""
    return np.argsort(-occurrences, kind="stable")


def count_frequent(sorted_occurrences: np.ndarray, mass: float) -> int:
    """Return the length of the shortest prefix of `sorted_occurrences` that covers a share `mass` of their sum.

    `sorted_occurrences` is descending. Ids that never occur are not counted: `mass` = 1 covers exactly the other ids.
    """
    if mass == 1:
        return int(np.count_nonzero(sorted_occurrences))
    covered = np.cumsum(sorted_occurrences)
    # The tolerance compensates rounding: 7 of 100 occurrences cover a mass of 0.07, though 0.07 * 100 > 7.
    target = mass * covered[-1] * (1 - 1e-12)
    return int(np.searchsorted(covered, target)) + 1 if target > 0 else 0


class FrequencyBands:
    """Bands of token ids: the ids by descending frequency are cut where they cover 40 % and 90 % of all tokens.

    Args:
        occurrences: Occurrences of each id, float64 `[vocab]`, see `TokenFrequency.occurrences`.

    Attributes:
        names: Name of each band, from the band of the most frequent ids on.
        band_of_id: Band of each id, int64 `[vocab]`. The last band also holds the ids that never occur.
    """

    names = ("top 40 %", "next 50 %", "last 10 %")

    def __init__(self, occurrences: np.ndarray) -> None:
        ids = ids_by_frequency(occurrences)
        ends = [count_frequent(occurrences[ids], share) for share in (0.4, 0.9)]
        # One id can cover both shares, so a band can be empty: its end is not after its start.
        self.band_of_id = np.empty(len(ids), np.int64)
        self.band_of_id[ids] = np.searchsorted(ends, np.arange(len(ids)), side="right")


def check_same_vocabulary(frequency: TokenFrequency, mask: RoutingMask) -> None:
    """Raise `UserError` if counts have another number of ids than a mask, or were made with another tokenizer."""
    if frequency.vocab_size != mask.vocab_size:
        raise UserError(f"the counts are for {frequency.vocab_size} ids, the mask is for {mask.vocab_size}")
    made_with = mask.provenance.tokenizer
    tokenizers = {record.sha256 for record in (frequency.tokenizer, made_with) if record is not None}
    if len(tokenizers) > 1:
        raise UserError(f"the counts were made with {frequency.tokenizer}, the mask with {made_with}")


def expected_expert_load(mask: RoutingMask, occurrences: np.ndarray, topk: int) -> np.ndarray:
    """Return the expected load of each expert, float64 `[tables, N]`, if the router uses visible experts evenly.

    Args:
        mask: The routing mask.
        occurrences: Occurrences of each id, `[vocab]`, see `TokenFrequency.occurrences`.
        topk: k; each occurrence of an id adds a load of 1 to `min(k, V)` of its V visible experts.
    """
    loads = []
    for row_of_id, visible_bits, sizes in zip(mask.row_of_id, mask.visible_bits, mask.row_sizes, strict=True):
        row_occurrences = np.bincount(row_of_id, weights=occurrences, minlength=len(visible_bits))
        load_of_each_expert = row_occurrences * np.minimum(sizes, topk) / sizes  # [rows]
        loads.append(load_of_each_expert @ unpack_bits(visible_bits, mask.num_experts))
    return np.stack(loads)


def heaviest_shares(mask: RoutingMask, occurrences: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each id's share of all load, and its visible experts, in the layer in which it loads each of them most.

    Arguments are those of `expected_expert_load`. Both results are `[vocab]`.
    """
    shares, visible = np.zeros(mask.vocab_size), np.ones(mask.vocab_size, np.int64)
    for table in range(len(mask.row_of_id)):
        num_visible = mask.num_visible_of_layer(table)
        load = occurrences * np.minimum(num_visible, topk)
        own_shares = load / load.sum()
        is_heavier = own_shares / num_visible > shares / visible
        shares = np.where(is_heavier, own_shares, shares)
        visible = np.where(is_heavier, num_visible, visible)
    return shares, visible


def overloading_ids(mask: RoutingMask, shares: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Return the ids that alone overload an expert or rank, so that no mask with these set sizes is balanced.

    Such an id gives each of its visible experts in a layer more than 1/N of the load of all ids, each of which adds
    min(k, V) times its occurrences. In a rank-local mask, an id with more load than one rank's share also counts.

    Args:
        mask: The routing mask.
        shares: See `heaviest_shares`.
        visible: See `heaviest_shares`.

    Returns:
        The ids, int64 `[ids]`, the id with the largest load of an expert first.
    """
    num_ranks = mask.provenance.expert_model_parallel_size or 1
    per_expert = shares / visible
    ids = np.flatnonzero((per_expert > 1 / mask.num_experts) | (shares > 1 / num_ranks))
    return ids[np.argsort(-per_expert[ids], kind="stable")]
