"""Reads, checks and writes the files of models in transformers' format, and loads exported models."""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import maskmoe.huggingface  # noqa: F401 (registers the model, else transformers warns of an unknown type)
from maskmoe.conversion.settings import CONFIG_FILE, read_model_config
from maskmoe.conversion.tensor_sources import Block, TensorSource, TensorSpec
from maskmoe.errors import UserError, listed, refused_by_system
from maskmoe.files.json_files import read_record, write_record
from maskmoe.files.outputs import atomic_output, refuse_checkpoint, sync_to_disk, unwinding_on_signals
from maskmoe.files.parsing import reading
from maskmoe.files.untrusted import resolve_inside

SINGLE_FILE = "model.safetensors"
INDEX_SUFFIX = ".index.json"
UNFINISHED = ".unfinished"
"""Suffix of the name of a folder that a conversion is filling."""

_ADVICE = "export the model again"
# Without `trust_remote_code`, transformers would offer to run code of the folder.
_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

# A tensor of an 8-bit float type means nothing without its scales, which every format stores in another way.
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "U8": torch.uint8},
}


class _Index(BaseModel):
    """The index of a model in several files: for each tensor, the name of the file that holds the tensor."""

    weight_map: dict[str, str]


class SafetensorsSource:
    """Provides the tensors of a folder with `model.safetensors`, or with several files and their index.

    A folder with both a single file and an index is read as transformers reads it: the index is ignored.

    Args:
        folder: The folder of the model.
        single_file: The name of the file if there is only one. The index of several files has this name and the
            suffix `.index.json`. The name may begin with a folder inside `folder`.

    Attributes:
        tensors: Shapes and dtypes of the tensors by name.
        files: The files that hold the tensors, all of them regular files inside the folder.

    Raises:
        UserError: A file is missing or damaged, or lies outside the folder.
    """

    def __init__(self, folder: Path, single_file: str = SINGLE_FILE) -> None:
        path, index_file = folder / single_file, folder / f"{single_file}{INDEX_SUFFIX}"
        names = {path.name}
        if not path.exists() and index_file.exists():
            names = set(read_record(_Index, index_file, "replace the file by an intact copy").weight_map.values())
        self.files = [resolve_inside(path.parent, name) for name in sorted(names)]
        self.tensors: dict[str, TensorSpec] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            specs = _read_specs(file)
            self.tensors |= specs
            self._file_of |= dict.fromkeys(specs, file)

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
        UserError: The file is damaged, or holds tensors of an unsupported type.
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
) -> None:
    """Write tensors to one file, or to several files and an index, as transformers does.

    The tensors of one file are in memory at a time.

    Args:
        source: Provides the tensors.
        names: The names of the tensors to write.
        folder: The folder for the files.
        max_file_bytes: Upper bound of the bytes of tensors in a file, unless one tensor alone is larger.
        single_file: See `SafetensorsSource`.
    """
    specs = {name: source.tensors[name] for name in names}
    split = split_torch_state_dict_into_shards(
        {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()},
        filename_pattern=single_file.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=max_file_bytes,
    )
    (folder / single_file).parent.mkdir(exist_ok=True)
    for file, names_in_file in tqdm(split.filename_to_tensors.items(), "writing", unit="file"):
        tensors = {name: source.read(Block.whole(name, specs[name].shape)).contiguous() for name in names_in_file}
        with atomic_output(folder / file) as path:
            save_file(tensors, path, metadata={"format": "pt"})
        del tensors  # before the tensors of the next file are read
    if split.is_sharded:
        file_of = {name: Path(file).name for name, file in split.tensor_to_filename.items()}
        index: dict[str, Any] = {"metadata": split.metadata, "weight_map": file_of}
        write_record(index, folder / f"{single_file}{INDEX_SUFFIX}")


def load_exported_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a folder, without running code of the folder; None if the folder has no tokenizer.

    Raises:
        UserError: The tokenizer is missing or damaged, or `config.json` is refused.
    """
    read_model_config(folder / CONFIG_FILE)  # transformers builds the configuration to choose the tokenizer's class
    if not any(folder.glob("tokenizer*")):
        return None
    with reading(f"the tokenizer in {folder}", _ADVICE):
        return AutoTokenizer.from_pretrained(folder, **_OPTIONS)


def load_exported_model(folder: Path) -> Any:
    """Load the model of a folder, in evaluation mode and on a GPU if there is one, without running code of the folder.

    Raises:
        UserError: A file is missing or damaged; `config.json` is refused; or weights are missing or superfluous, of
            which transformers only warns.
    """
    read_model_config(folder / CONFIG_FILE)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with reading(f"the model in {folder}", _ADVICE):
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, **_OPTIONS
        )
    for problem, meaning in (("missing_keys", "lacks"), ("unexpected_keys", "has unknown")):
        if names := loading[problem]:
            raise UserError(f"the model in {folder} {meaning} weights: {listed(sorted(names), most=3)}; {_ADVICE}")
    # Under the CPU adapter, the current device is the CPU.
    return model.to(torch.cuda.current_device() if torch.cuda.is_available() else "cpu").eval()


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`; give it the name `folder` on success, remove it on failure.

    All files are on the disk before the folder gets its name. SIGTERM and SIGHUP count as failures.

    Raises:
        UserError: The folder has content, another conversion is writing it, the disk is full, or a file cannot be
            written.
    """
    refuse_checkpoint(folder)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    folder = Path(os.path.realpath(folder))
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with refused_by_system(f"cannot write {unfinished}", "remove this folder if no conversion is running"):
        unfinished.mkdir(parents=True)
    with refused_by_system(f"cannot write {folder}"), unwinding_on_signals():
        try:
            yield unfinished
            for path in (unfinished, *unfinished.rglob("*")):
                sync_to_disk(path)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
