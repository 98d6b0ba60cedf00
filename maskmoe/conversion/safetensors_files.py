"""Reads and plans models in safetensors files, one file or several with an index, as transformers stores them."""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field
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


class _Index(BaseModel):
    """The index of a model in several files: for each tensor, the name of the file that holds the tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/]+$")]]


class SafetensorsSource:
    """Provides the tensors of a folder with `model.safetensors`, or with several files and their index.

    Args:
        folder: the folder of the model.
        single_file: the name of the file if there is only one. The index of several files has this name and the
            suffix `.index.json`.

    Attributes:
        tensors: shapes and dtypes of the tensors by name.
        files: the files that hold the tensors.

    Raises:
        UserError: a file is missing or damaged, or holds other tensors than the index says.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        index_file = folder / f"{single_file}.index.json"
        index = _read_index(index_file) if index_file.is_file() else None
        names = [single_file] if index is None else sorted(set(index.values()))
        self.files = [folder / name for name in names]
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            found = _read_header(file)
            if index is not None:
                expected = {tensor for tensor, name in index.items() if name == file.name}
                _check_against_index(file, found.keys(), expected)
            self._stored |= found
        self.tensors = {name: stored.spec for name, stored in self._stored.items()}

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._stored[block.tensor].read(block)


@dataclass(frozen=True)
class SafetensorsPlan:
    """A model in safetensors files that is yet to be written.

    Attributes:
        files: the files.
        index: content of the index file; None if there is only one file.
    """

    files: Sequence[PlannedFile]
    index: dict[str, Any] | None


def plan_safetensors(
    tensors: Mapping[str, TensorSpec], max_file_bytes: int, single_file: str = SINGLE_FILE
) -> SafetensorsPlan:
    """Distribute tensors over files, in the order of the tensors.

    Args:
        tensors: shapes and dtypes by name.
        max_file_bytes: upper bound of the bytes of tensors in a file, unless one tensor alone is larger.
        single_file: the name of the file if one is enough; several files get numbers in their names.
    """
    groups = _divide(tensors, max_file_bytes)
    if len(groups) == 1:
        return SafetensorsPlan([_plan_file(single_file, groups[0])], None)
    stem = single_file.removesuffix(".safetensors")
    names = [f"{stem}-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(spec.num_bytes for spec in tensors.values())},
        "weight_map": {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group},
    }
    return SafetensorsPlan([_plan_file(*pair) for pair in zip(names, groups, strict=True)], index)


def _divide(tensors: Mapping[str, TensorSpec], max_file_bytes: int) -> list[dict[str, TensorSpec]]:
    """Divide tensors into groups, each for one file."""
    groups: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in tensors.items():
        if groups[-1] and size + spec.num_bytes > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += spec.num_bytes
    return groups


def _plan_file(name: str, tensors: Mapping[str, TensorSpec]) -> PlannedFile:
    # Larger elements come first, so that every element lies at a multiple of its size, as the library does it.
    """Plan a file: a header of JSON, then the elements of all tensors in blocks."""
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
    """Read an index; return for each tensor the name of its file.

    Raises:
        UserError: the index is damaged.
    """
    try:
        return _Index.model_validate_json(path.read_bytes()).weight_map
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return where the tensors of a file lie, by name.

    Raises:
        UserError: the file is missing or damaged, or holds tensors of an unsupported type.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt"):  # raises if the header contradicts itself or the file is too short
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


def _check_against_index(path: Path, found: Set[str], expected: Set[str]) -> None:
    """Check that a file holds exactly the tensors that the index places in it.

    Raises:
        UserError: the file lacks a tensor or holds another one; names the tensor.
    """
    if missing := sorted(expected - found):
        raise UserError(f"{path} lacks {missing[0]}, which {INDEX_FILE} places in it")
    if surplus := sorted(found - expected):
        raise UserError(f"{path} holds {surplus[0]}, which {INDEX_FILE} does not place in it")
