"""Megatron's `--data-path`: the prefixes and blend weights of datasets."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import UserError


def parse_data_path(data_path: Sequence[str]) -> tuple[list[str], list[float | None]]:
    """Split Megatron's `--data-path` into dataset prefixes and blend weights; all weights are None if none is given.

    The rules are those of `megatron.core.datasets.utils.get_blend_from_list`. All items are prefixes if their number is
    odd or if no item at an even position is a number. Otherwise weights and prefixes alternate.

    Raises:
        UserError: `data_path` is empty, only some datasets have a weight, or a weight is not a positive number.
    """
    if not data_path:
        raise UserError("--data-path is empty; give PREFIX… or WEIGHT PREFIX …")
    items = [item.strip() for item in data_path]
    weights: dict[int, float] = {}
    for position, item in enumerate(items[::2]):
        with suppress(ValueError):
            weights[position] = float(item)
    if len(items) % 2 or not weights:
        return items, [None] * len(items)
    for position, item in enumerate(items[::2]):
        if position not in weights:
            raise UserError(f"--data-path has weights for some datasets, but {item!r} stands where one is expected")
        if not 0 < weights[position] < math.inf:
            raise UserError(f"--data-path: blend weight {item} is not a positive number")
    return items[1::2], list(weights.values())


def files_of_data_path(data_path: Sequence[str]) -> list[Path]:
    """Return the paths of all files of the datasets of `--data-path`. Raises UserError, see `parse_data_path`."""
    prefixes = parse_data_path(data_path)[0]
    return [path for prefix in prefixes for path in dataset_files(prefix)]
