"""Tensors in safetensors files, one or several with an index, as transformers stores models."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSpec, row_major_blocks
from maskmoe.conversion.stored_tensors import StoredTensor
from maskmoe.conversion.writing import BLOCK_BYTES, PlannedFile, Segment
from maskmoe.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_ALIGNMENT = 8


class SafetensorsSource:
    """The tensors of a folder with `model.safetensors`, or with several files and their index.

    Args:
        folder: of the model.
        single_file: the name, if there is but one.

    Attributes:
        tensors: by name.
        files: the files that hold them.

    Raises:
        UserError: a file is missing or damaged, or holds other tensors than the index says.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE):
        index = folder / f"{single_file}.index.json"
        if index.is_file():
            file_of = _read_index(index)
            self.files = [folder / name for name in sorted(set(file_of.values()))]
        else:
            file_of = None
            self.files = [folder / single_file]
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            found = _read_header(file)
            if file_of is not None:
                _check_against_index(file, found.keys(), {name for name, of in file_of.items() if of == file.name})
            self._stored |= found
        self.tensors = {name: stored.spec for name, stored in self._stored.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        return self._stored[block.tensor].read(block)


@dataclass(frozen=True)
class SafetensorsPlan:
    """Files of safetensors to write.

    Attributes:
        files: to write.
        index: content of the index, None if there is but one file.
    """

    files: Sequence[PlannedFile]
    index: dict[str, Any] | None


def plan_safetensors(
    tensors: Mapping[str, TensorSpec], most_bytes: int, single_file: str = SINGLE_FILE
) -> SafetensorsPlan:
    """Plan files for tensors, in their order.

    Args:
        tensors: by name.
        most_bytes: of the tensors in a file, unless one alone has more.
        single_file: the name, if one file does.
    """
    groups = _divide(tensors, most_bytes)
    if len(groups) == 1:
        return SafetensorsPlan([_plan_file(single_file, groups[0])], None)
    stem = single_file.removesuffix(".safetensors")
    names = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in tensors.values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    return SafetensorsPlan([_plan_file(*pair) for pair in zip(names, groups, strict=True)], index)


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB, 300MiB or 1000; of a file's tensors in transformers' `max_shard_size`.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+)(?:([KMGT])(I?)B)?", text.strip().upper())
    if not match or not int(match[1]):
        raise ValueError(f"{text!r} is not a size such as 5GB")
    return int(match[1]) * (1024 if match[3] else 1000) ** (" KMGT".index(match[2]) if match[2] else 0)


def _divide(tensors: Mapping[str, TensorSpec], most_bytes: int) -> list[dict[str, TensorSpec]]:
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + spec.num_bytes > most_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.num_bytes
    return groups


def _plan_file(name: str, tensors: Mapping[str, TensorSpec]) -> PlannedFile:
    # Elements must lie at multiples of their size, as the library itself sees to.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    ends = [0, *accumulate(spec.num_bytes for spec in ordered.values())]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for (tensor, spec), offsets in zip(ordered.items(), pairwise(ends), strict=True):
        header[tensor] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    blocks = (block for tensor, spec in ordered.items() for block in row_major_blocks(tensor, spec, BLOCK_BYTES))
    return PlannedFile(name, [Segment(head), *(Segment(block=block) for block in blocks)], len(head) + ends[-1])


def _read_index(path: Path) -> dict[str, str]:
    try:
        file_of = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in file_of.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged") from error
    return file_of


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a file are."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):  # refuses whatever does not fit together, and short files
            pass
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    header.pop("__metadata__", None)
    if unknown := sorted({entry["dtype"] for entry in header.values()} - _DTYPES.keys()):
        raise UserError(f"{path} holds tensors of the type {unknown[0]}, which is not supported")
    return {
        name: StoredTensor(
            path, 8 + length + entry["data_offsets"][0], TensorSpec(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        )
        for name, entry in header.items()
    }


def _check_against_index(path: Path, found: Any, expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise UserError(f"{path} lacks {missing[0]}, which {INDEX_FILE} places in it")
    if surplus := sorted(found - expected):
        raise UserError(f"{path} holds {surplus[0]}, which {INDEX_FILE} does not place in it")
