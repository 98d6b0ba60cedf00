"""Join datasets, such as the shards that many machines have made of one text, into one dataset."""

import glob
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from maskmoe.data.indexed_dataset import (
    IndexedDatasetWriter,
    copy_in_order,
    copy_shuffled,
    dataset_files,
    idx_path,
    read_index,
    read_tokenizer_record,
)
from maskmoe.data.sharding import ShardRecord, shard_record_path
from maskmoe.data.tokenizer import TokenizerRecord
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_record
from maskmoe.files.outputs import check_outputs

_SHARD = re.compile(r"(.*)-(\d{5,})-of-(\d{5,})(.*)", re.DOTALL)


def merge_datasets(
    names: Sequence[str],
    output_prefix: str,
    json_keys: Sequence[str] | None = None,
    shuffle_seed: int | None = None,
    force: bool = False,
) -> list[IndexedDatasetWriter]:
    """Join datasets in the given order.

    The result has the bytes of the dataset that `preprocess` makes of the whole text, if the datasets are its shards in
    order. A progress bar is shown if stderr is a terminal.

    Args:
        names: Either prefixes of datasets, or output prefixes of shards. An output prefix stands for all shards
            `PREFIX-I-of-N_KEY_document` of each key in order.
        output_prefix: Prefix of the joined dataset; or its start, to which `_KEY_document` is added, if `names` are
            output prefixes, too.
        json_keys: Keys of the datasets, if `names` are output prefixes; None for `text`.
        shuffle_seed: Seed of a random order of all documents, the same for all keys. None keeps the order.
        force: Whether to replace earlier datasets of these names.

    Returns:
        The writers, which tell the prefixes and the sizes of the joined datasets.

    Raises:
        UserError: A dataset is missing, damaged, or given twice; the datasets differ in tokenizer or dtype; shards are
            missing, or are not of one text; `names` are prefixes of datasets, and keys are given; or an output is an
            input, or exists and `force` is false. Then nothing is written.
    """
    merges = _find_datasets(names, output_prefix, json_keys)
    outputs = [path for output in merges for path in dataset_files(output)]
    inputs = [path for prefixes in merges.values() for prefix in prefixes for path in dataset_files(prefix)]
    check_outputs(outputs, inputs, force)
    checked = {output: _check_datasets(prefixes, shuffle_seed is not None) for output, prefixes in merges.items()}
    writers = []
    with ExitStack() as stack:
        for output, prefixes in merges.items():
            writer = stack.enter_context(IndexedDatasetWriter(output, *checked[output]))
            if shuffle_seed is None:
                copy_in_order(prefixes, writer)
            else:
                copy_shuffled(prefixes, writer, shuffle_seed)
            if writer.num_tokens == 0:
                raise UserError(f"the {len(prefixes)} datasets hold no tokens: there is nothing to train on")
            writers.append(writer)
    return writers


def _find_datasets(names: Sequence[str], output_prefix: str, json_keys: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the prefixes of the datasets to join, for the prefix of each joined dataset."""
    dataset = next((name for name in names if idx_path(name).is_file()), None)
    if dataset is None:
        return {
            f"{output_prefix}_{key}_document": [shard for name in names for shard in _find_shards(name, key)]
            for key in json_keys or ("text",)
        }
    if json_keys is not None:
        raise UserError(f"--json-keys is for output prefixes, but {dataset} is a dataset: leave --json-keys out")
    return {output_prefix: list(names)}


def _find_shards(name: str, key: str) -> list[str]:
    """Return the prefixes of all shards that `preprocess` has made for an output prefix and a key, in order."""
    pattern = f"{glob.escape(name)}-*-of-*{glob.escape(f'_{key}_document.idx')}"
    matches = [match for path in glob.glob(pattern) if (match := _SHARD.fullmatch(path.removesuffix(".idx")))]
    shards = {(int(match[3]), int(match[2])): match[0] for match in matches if match[1] == name}
    counts = sorted({count for count, _ in shards})
    if not counts:
        raise UserError(
            f"there is no dataset {name}, and no shard {name}-00000-of-N_{key}_document; give prefixes without .idx"
        )
    if len(counts) > 1:
        listed = " and ".join(map(str, counts))
        raise UserError(f"{name} has shards of {listed}; name the shards, or delete those of an earlier division")
    numbers = [(counts[0], index) for index in range(counts[0])]
    missing = [f"{index}/{count}" for count, index in numbers if (count, index) not in shards]
    if missing:
        raise UserError(
            f"{name} lacks {len(missing)} of {counts[0]} shards, the first is {missing[0]}: make it with --shard"
        )
    return [shards[number] for number in numbers]


def _check_datasets(prefixes: Sequence[str], shuffled: bool) -> tuple[np.dtype, TokenizerRecord | None]:
    """Check that the datasets can be joined; return their dtype, and the record of their tokenizer or None."""
    paths = [idx_path(prefix).resolve() for prefix in prefixes]
    first, tokenizer = read_index(prefixes[0]), read_tokenizer_record(prefixes[0])
    texts: dict[tuple[str, ...], tuple[str, str]] = {}
    for number, prefix in enumerate(prefixes):
        index, record = read_index(prefix), read_tokenizer_record(prefix)
        if paths[number] in paths[:number]:
            raise UserError(f"dataset {prefix} is given twice")
        if index.has_modes:
            raise UserError(f"dataset {prefix} is multimodal, and cannot be joined")
        if shuffled and index.has_documents_of_many_sequences:
            raise UserError(f"dataset {prefix} has documents of several sequences, which cannot be shuffled")
        if index.dtype != first.dtype:
            raise UserError(f"datasets differ: {prefixes[0]} has {first.dtype} ids, {prefix} has {index.dtype} ids")
        if not _is_same_tokenizer(tokenizer, record):
            raise UserError(
                f"datasets differ in their tokenizers: {prefixes[0]} was made with {tokenizer or 'an unknown one'}, "
                f"{prefix} with {record or 'an unknown one'}"
            )
        _check_shard(prefix, texts)
    return first.dtype, tokenizer


def _is_same_tokenizer(first: TokenizerRecord | None, second: TokenizerRecord | None) -> bool:
    """Return whether two records differ in the name of the model's file at most."""
    if first is None or second is None:
        return first is second
    return replace(first, model=second.model) == second


def _check_shard(prefix: str, texts: dict[tuple[str, ...], tuple[str, str]]) -> None:
    """Check that a shard was made of the same text as the shards of the same name before it. Raises UserError.

    Args:
        prefix: Prefix of a dataset, which need not be a shard.
        texts: The first shard of each name, with the digest of its text; this function adds to it.
    """
    path, match = shard_record_path(prefix), _SHARD.fullmatch(str(prefix))
    if match is None or not path.exists():
        return
    text = read_record(ShardRecord, path, "make the shard again").text_sha256
    other, text_of_other = texts.setdefault((match[1], match[3], match[4]), (prefix, text))
    if text != text_of_other:
        raise UserError(
            f"shards {other} and {prefix} were made of different input files, or with different settings or "
            "tokenizers: make all shards again"
        )
