"""Reads and plans models in safetensors files, one file or several with an index, as transformers stores them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch import Tensor

from maskmoe.conversion.blocks import Block, StoredTensor, TensorSpec, row_major_blocks
from maskmoe.conversion.writing import BLOCK_BYTES, PlannedFile
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.surrogates import has_surrogates
from maskmoe.files.untrusted import check_name, check_regular, read_json_bytes, resolve_inside

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".index.json"

# A tensor of an 8-bit float type means nothing without its scales, which every format stores in another way.
_DTYPES = {name: dtype for name, dtype in _TYPES.items() if dtype and not name.startswith("F8_")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_HEADER_ALIGNMENT = 8


class _Index(BaseModel):
    """The index of a model in several files: for each tensor, the name of the file that holds the tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/]+$", max_length=255)]]


def has_safetensors(folder: Path, single_file: str) -> bool:
    """Return whether a folder has tensors in a file of this name, or in several files with an index of this name."""
    return any((folder / name).exists() for name in (single_file, f"{single_file}{INDEX_SUFFIX}"))


class SafetensorsSource:
    """Provides the tensors of a folder with `model.safetensors`, or with several files and their index.

    A folder with both is read as transformers reads it: the index is ignored.

    Args:
        folder: the folder of the model.
        single_file: the name of the file if there is only one. The index of several files has this name and the
            suffix `.index.json`. The name may begin with a folder inside `folder`.

    Attributes:
        tensors: shapes and dtypes of the tensors by name.
        files: the files that hold the tensors.

    Raises:
        UserError: a file is missing or damaged, or holds other tensors than the index says.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        index_file = folder / f"{single_file}{INDEX_SUFFIX}"
        # The single file comes first, as in transformers, which leaves an older index when it saves again.
        has_index = os.path.lexists(index_file) and not (folder / single_file).exists()
        index = _read_index(index_file) if has_index else None
        names = [index_file.name.removesuffix(INDEX_SUFFIX)] if index is None else sorted(set(index.values()))
        self.files = [index_file.parent / name for name in names]
        for name in () if index is None else names:
            check_name(index_file.parent, name)
            if os.path.lexists(index_file.parent / name):
                resolve_inside(index_file.parent, name)
        self._stored: dict[str, StoredTensor] = {}
        for file in self.files:
            found = _read_header(file)
            expected = found.keys() if index is None else {name for name in index if index[name] == file.name}
            for name in sorted(expected - found.keys()):
                raise UserError(f"{file} lacks {name}, which {index_file.name} places in it")
            for name in sorted(found.keys() - expected):
                raise UserError(f"{file} holds {name}, which {index_file.name} does not place in it")
            self._stored |= found
        self.tensors = {
            name: TensorSpec(tuple(stored.layout.shape), stored.layout.dtype) for name, stored in self._stored.items()
        }

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        return self._stored[block.tensor].read(block)


def plan_safetensors(
    tensors: Mapping[str, TensorSpec], max_file_bytes: int, single_file: str = SINGLE_FILE
) -> tuple[list[PlannedFile], dict[str, Any] | None]:
    """Distribute tensors over files as transformers does.

    Args:
        tensors: shapes and dtypes by name.
        max_file_bytes: upper bound of the bytes of tensors in a file, unless one tensor alone is larger.
        single_file: the name of the file if one is enough, which may begin with a folder; several files get numbers in
            their names.

    Returns:
        the files, and the content of the index file; no index if there is only one file.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda spec: spec.num_bytes,
        filename_pattern=single_file.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_file_bytes,
    )
    files = [
        _plan_file(file, {name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()
    ]
    file_of = {name: file.rpartition("/")[2] for name, file in split.tensor_to_filename.items()}
    index = {"metadata": split.metadata, "weight_map": file_of}
    return files, index if split.is_sharded else None


def _plan_file(file: str, tensors: Mapping[str, TensorSpec]) -> PlannedFile:
    """Plan a file: a header of JSON, then the elements of all tensors in blocks."""
    # Larger elements come first, so that every element lies at a multiple of its size, as the library does it.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blocks: list[Block] = []
    size = 0
    for name, spec in ordered:
        offsets = size, size + spec.num_bytes
        header[name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
        blocks += row_major_blocks(name, spec, BLOCK_BYTES)
        size += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return PlannedFile(file, [head, *blocks], len(head) + size)


def _read_index(path: Path) -> dict[str, str]:
    """Read an index; return for each tensor the name of its file.

    Raises:
        UserError: the index is damaged.
    """
    try:
        return _Index.model_validate_json(read_json_bytes(path)).weight_map
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({first_problem(error)}); replace the file by an intact copy") from error


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return where the tensors of a file lie, by name.

    Raises:
        UserError: the file is missing or damaged, or holds tensors of an unsupported type.
    """
    if not os.path.lexists(path):
        raise UserError(f"{path} is missing")
    if has_surrogates(str(path)):
        raise UserError(f"{str(path)!a} cannot be read, since the name is not valid UTF-8; rename the folder")
    check_regular(path)
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
    stored = {}
    for name, entry in header.items():
        layout = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
        stored[name] = StoredTensor(path, 8 + length + entry["data_offsets"][0], layout)
    return stored
