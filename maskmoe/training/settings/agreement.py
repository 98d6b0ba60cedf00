"""Compares what the ranks of a run were started with, before ranks that differ could hang or train together.

Nodes may have a command line and files of their own. Different learning rates or routing masks would train together
without an error; a different batch size or top-k would hang in the first collective that has another shape.
"""

import hashlib
import json
import socket
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import megatron.core
import torch

import maskmoe
from maskmoe.data.indexed_dataset import bin_path, idx_path
from maskmoe.errors import UserError, listed
from maskmoe.training.settings.inputs import blends_of

# Arguments that number a rank, or name a folder that a node may have for itself.
_OF_ONE_NODE = {"rank", "local_rank", "data_cache_path", "tensorboard_dir", "wandb_save_dir"}
# Arguments that name files, whose contents are compared instead of their paths.
_FILES = ("routing_mask", "tokenizer_model", "vocab_file", "merge_file")
# Arguments that name datasets, whose contents are compared instead of their paths.
_DATASETS = (
    *("data_path", "train_data_path", "valid_data_path", "test_data_path"),
    *("data_args_path", "per_split_data_args_path"),
)
_MOST_BYTES = 1 << 24  # of a file in a folder whose content is read
_MOST_BYTES_OF_DATASET = 1 << 16  # at the beginning of each of its files: the lengths and ids of the first documents
_MOST_NAMED = 8

Facts = dict[str, str]


def check_agreement(args: Namespace, gather: Callable[[str, str], list[str]]) -> None:
    """Raise the same `UserError` on all ranks if they differ in settings, files or software; all ranks must call this.

    Args:
        args: The parsed arguments.
        gather: Takes a key and a message, and returns the messages of all ranks, ordered by rank.
    """
    facts = _settings(args) | _files(args)
    # Thousands of ranks send their settings only if some differ.
    digests = gather("digests of settings", _digest(json.dumps(facts)))
    if len({*digests}) > 1:
        found = map(json.loads, gather("settings", json.dumps([socket.gethostname(), facts])))
        hosts, of_ranks = zip(*found, strict=True)
        raise UserError(f"the ranks were not started alike: {listed([*_differences(of_ranks, hosts)], _MOST_NAMED)}")


def digest_of_datasets(args: Namespace) -> str:
    """Return a digest of the sizes, beginnings and weights of all datasets. Raises UserError if flags name none."""
    blends = [([*map(_describe_dataset, prefixes)], weights) for prefixes, weights in blends_of(args)]
    return _digest(json.dumps(blends))


def _settings(args: Namespace) -> Facts:
    """Return the arguments and the versions that must be equal on all ranks."""
    names = sorted(vars(args).keys() - _OF_ONE_NODE - {*_FILES, *_DATASETS})
    values = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    versions = {package.__name__: package.__version__ for package in (maskmoe, megatron.core, torch)}
    return versions | {name: str(value) for name, value in values.items() if not callable(value)}


def _files(args: Namespace) -> Facts:
    """Return digests of the files that the arguments name, as this node sees them."""
    facts = {}
    for name in _FILES:
        if (path := getattr(args, name, None)) is not None:
            facts[f"the content of --{name.replace('_', '-')}"] = _describe_file(Path(path))
    try:
        prefixes = [prefix for prefixes, _ in blends_of(args) for prefix in prefixes]
        missing = [prefix for prefix in prefixes if not Path(idx_path(prefix)).is_file()]
        absent = f" without {listed(missing, _MOST_NAMED)}, which does not exist" if missing else ""
        facts["the content of the datasets"] = f"{digest_of_datasets(args)}{absent}"
    except UserError as error:  # which the checks of this rank will report
        facts["the content of the datasets"] = str(error)
    return facts


def _describe_dataset(prefix: str) -> str:
    """Describe a dataset by its sizes and the digest of its beginning, or by its prefix if a file is missing."""
    paths = (Path(idx_path(prefix)), Path(bin_path(prefix)))
    if not all(path.is_file() for path in paths):
        return prefix
    beginnings = []
    for path in paths:
        with open(path, "rb") as stream:
            beginnings.append(stream.read(_MOST_BYTES_OF_DATASET))
    return f"{[path.stat().st_size for path in paths]} {_digest(b''.join(beginnings))}"


def _describe_file(path: Path) -> str:
    """Return the digest of a file, or of the names, sizes and small files of a folder."""
    if not path.is_dir():
        return _digest(path.read_bytes()) if path.is_file() else "missing"
    parts = []
    for child in sorted(path.iterdir()):
        if child.is_file():
            size = child.stat().st_size
            parts.append(f"{child.name} {size} {_digest(child.read_bytes()) if size <= _MOST_BYTES else ''}")
    return _digest("\n".join(parts))


def _digest(content: str | bytes) -> str:
    """Return the beginning of a SHA-256 digest, hexadecimal."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]


def _differences(facts: Sequence[Facts], hosts: Sequence[str]) -> Iterator[str]:
    """Yield what differs between ranks, with each value and its ranks."""
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        ranks_of: dict[str, list[int]] = {}
        for rank, of_rank in enumerate(facts):
            if name in of_rank:
                ranks_of.setdefault(of_rank[name], []).append(rank)
        if len(ranks_of) > 1:
            parts = (f"{value} on {_place(ranks, hosts)}" for value, ranks in ranks_of.items())
            yield f"{name} is {', but '.join(parts)}"


def _place(ranks: list[int], hosts: Sequence[str]) -> str:
    """Return the ranks with the host of the first one, in words."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {listed([str(rank) for rank in ranks], _MOST_NAMED)} (host {hosts[ranks[0]]})"
