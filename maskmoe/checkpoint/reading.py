"""Reads the layout, the arguments and single tensors of a `torch_dist` checkpoint, without running code from it.

A checkpoint may come from a stranger. Only the functions import torch.
"""

import dataclasses
import enum
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from maskmoe.errors import UserError
from maskmoe.files.untrusted import UnusableFile, check_name, open_regular, resolve_inside

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.metadata import Metadata

LAYOUT_FILE = ".metadata"
# The only classes and functions that the layout of a checkpoint may name.
_LAYOUT_MODULES = {f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem")}
_CONSTRUCTORS = {
    "builtins.set",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
}


@dataclasses.dataclass(eq=False)
class CheckpointError(UserError):
    """A fault of a checkpoint: its folder, and a clause that follows the folder's path, such as "does not exist"."""

    checkpoint: Path
    fault: str

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.fault}"


class UnfinishedCheckpointError(CheckpointError):
    """The fault of a checkpoint whose saving was interrupted."""


class _LayoutUnpickler(pickle.Unpickler):
    """Unpickles only the dataclasses and enumerations with which torch describes a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function by its name; raise `UnpicklingError` if it does not belong in a layout."""
        import torch

        module = module.removesuffix("._local")  # Python 3.13 pickles paths under `pathlib._local`, unknown to 3.12
        if f"{module}.{name}" in _CONSTRUCTORS:
            return super().find_class(module, name)
        if "." not in name:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if module in _LAYOUT_MODULES:
                found = super().find_class(module, name)
                if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, enum.Enum)):
                    return found
        raise pickle.UnpicklingError(f"refusing {module}.{name}, which does not belong in the layout of a checkpoint")


def read_layout(stream: BinaryIO) -> Any:
    """Read the `Metadata` in a `.metadata` file; raise `UnpicklingError` if the file holds anything else."""
    return _LayoutUnpickler(stream).load()


def read_checkpoint_layout(checkpoint: Path) -> "Metadata":
    """Read the description of the tensors of a checkpoint; raise `CheckpointError` if it is missing or damaged."""
    try:
        with open_regular(checkpoint / LAYOUT_FILE) as stream:
            layout = read_layout(stream)
        for name in {place.relative_path for place in layout.storage_data.values()}:
            check_name(checkpoint / LAYOUT_FILE, name)
        return layout
    except UnusableFile as error:
        missing = not os.path.lexists(checkpoint / LAYOUT_FILE)
        raise CheckpointError(checkpoint, f"{LAYOUT_FILE} {'is missing' if missing else error.reason}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(checkpoint, f"{LAYOUT_FILE} is damaged: {error}") from error
    # An unpickler raises exceptions of any class on damaged bytes.
    except Exception as error:
        raise CheckpointError(checkpoint, f"{LAYOUT_FILE} is damaged") from error


def read_common_state(checkpoint: Path) -> dict[str, Any]:
    """Read the state that all ranks share, such as Megatron's arguments; raise `CheckpointError` if it is damaged."""
    from megatron.core.dist_checkpointing import load_common_state_dict
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore"):  # torch would warn that this is a single process
            return load_common_state_dict(checkpoint)
    # An unpickler raises exceptions of any class on damaged bytes.
    except (Exception, CheckpointException) as error:
        fault = "holds no arguments of the run, or they are damaged or not just data"
        raise CheckpointError(checkpoint, fault) from error


def read_tensors(checkpoint: Path, is_wanted: Callable[[str], bool]) -> dict[str, "Tensor"]:
    """Read the tensors of a checkpoint whose names are wanted; raise `CheckpointError` if the checkpoint is damaged."""
    import torch
    from torch.distributed import checkpoint as torch_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    layout = read_checkpoint_layout(checkpoint)
    try:
        for name in {place.relative_path for key, place in layout.storage_data.items() if is_wanted(key.fqn)}:
            resolve_inside(checkpoint, name)
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in layout.state_dict_metadata.items()
            if is_wanted(name) and isinstance(entry, TensorStorageMetadata)
        }
        if tensors:
            torch_checkpoint.load(tensors, storage_reader=torch_checkpoint.FileSystemReader(checkpoint), no_dist=True)
    except UserError:
        raise
    # Torch's unpickler and zip reader raise exceptions of any class on damaged files.
    except (Exception, CheckpointException) as error:
        raise CheckpointError(checkpoint, "is not a readable torch_dist checkpoint: its files are damaged") from error
    return tensors
