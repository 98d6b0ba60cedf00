"""Reads and writes models in safetensors files, one file or several with an index, as transformers stores them."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSpec
from maskmoe.conversion.tensor_sources import TensorSource
from maskmoe.errors import UserError
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.outputs import atomic_output
from maskmoe.files.untrusted import check_regular, resolve_inside

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".index.json"

# A tensor of an 8-bit float type means nothing without its scales, which every format stores in another way.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
}


class _Index(BaseModel):
    """The index of a model in several files: for each tensor, the name of the file that holds the tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[^/]+$", max_length=255)]]


def has_safetensors(folder: Path, single_file: str) -> bool:
    """Return whether a folder has tensors in a file of this name, or in several files with an index of this name."""
    return any((folder / name).exists() for name in (single_file, f"{single_file}{INDEX_SUFFIX}"))


def find_weight_files(folder: Path, single_file: str = SINGLE_FILE) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files that hold a model's tensors, all of them regular files inside the folder.

    A folder with both a single file and an index is read as transformers reads it: the index is ignored.

    Args:
        folder: the folder of the model.
        single_file: the name of the file if there is only one. The index of several files has this name and the
            suffix `.index.json`. The name may begin with a folder inside `folder`.

    Returns:
        the files, and the name of the file of each tensor; None instead of the names if there is no index.

    Raises:
        UserError: a file is missing, is not a regular file or lies outside the folder; or the index is damaged.
    """
    path, index = folder / single_file, folder / f"{single_file}{INDEX_SUFFIX}"
    if path.exists() or not os.path.lexists(index):
        if not os.path.lexists(path):
            raise UserError(f"{path} is missing")
        check_regular(path)
        return [path], None
    file_of = read_record(_Index, index, "replace the file by an intact copy").weight_map
    for name in sorted(set(file_of.values())):
        if not os.path.lexists(index.parent / name) and name.isprintable():
            raise UserError(f"{index.parent / name} is missing")
        resolve_inside(index.parent, name)
    return [index.parent / name for name in sorted(set(file_of.values()))], file_of


class SafetensorsSource:
    """Provides the tensors of a folder with `model.safetensors`, or with several files and their index.

    Args:
        folder: the folder of the model.
        single_file: see `find_weight_files`.

    Attributes:
        tensors: shapes and dtypes of the tensors by name.
        files: the files that hold the tensors.

    Raises:
        UserError: a file is missing or damaged, or holds other tensors than the index says.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        self.files, index = find_weight_files(folder, single_file)
        self.tensors: dict[str, TensorSpec] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.files:
            specs = _read_specs(path)
            expected = specs.keys() if index is None else {name for name, file in index.items() if file == path.name}
            if differing := sorted(specs.keys() ^ expected):
                raise UserError(f"{path} and {single_file}{INDEX_SUFFIX} disagree on where {differing[0]} is")
            self.tensors |= specs
            self._file_of |= dict.fromkeys(specs, path)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        path = self._file_of[block.tensor]
        try:
            # Open the file for each block: an open file would keep all pages in memory that were ever read from it.
            with safe_open(path, framework="pt") as file:
                return file.get_slice(block.tensor)[block.slices]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error


def _read_specs(path: Path) -> dict[str, TensorSpec]:
    """Return shapes and dtypes of the tensors of a file, by name.

    Raises:
        UserError: the file is damaged, or holds tensors of an unsupported type.
    """
    specs = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                entry = file.get_slice(name)
                if entry.get_dtype() not in _DTYPES:
                    raise UserError(f"{path} holds tensors of the type {entry.get_dtype()}, which is not supported")
                specs[name] = TensorSpec(tuple(entry.get_shape()), _DTYPES[entry.get_dtype()])
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return specs


def write_safetensors(
    source: TensorSource, names: Collection[str], folder: Path, max_file_bytes: int, single_file: str = SINGLE_FILE
) -> list[str]:
    """Write tensors to one file, or to several files and an index, as transformers does.

    The tensors of one file are in memory at a time.

    Args:
        source: provides the tensors.
        names: the names of the tensors to write.
        folder: the folder for the files.
        max_file_bytes: upper bound of the bytes of tensors in a file, unless one tensor alone is larger.
        single_file: see `find_weight_files`.

    Returns:
        the names of the files, without the index.
    """
    specs = {name: source.tensors[name] for name in names}
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()},
        filename_pattern=single_file.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_file_bytes,
    )
    (folder / single_file).parent.mkdir(exist_ok=True)
    for file, names_in_file in split.filename_to_tensors.items():
        tensors = {name: source.read(Block.whole(name, specs[name].shape)).contiguous() for name in names_in_file}
        with atomic_output(folder / file) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        del tensors  # before the tensors of the next file are read
    if split.is_sharded:
        file_of = {name: Path(file).name for name, file in split.tensor_to_filename.items()}
        index: dict[str, Any] = {"metadata": split.metadata, "weight_map": file_of}
        write_record(index, folder / f"{single_file}{INDEX_SUFFIX}", indent=2)
    return list(split.filename_to_tensors)
