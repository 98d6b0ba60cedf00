"""Reads the pickled parts of `torch_dist` checkpoints without running code from them.

A checkpoint may come from a stranger. Torch unpickles its `.metadata` and its objects without restriction, so that a
crafted file can run any code. The functions of this module return nothing but data.
"""

import dataclasses
import enum
import pickle
from typing import Any, BinaryIO

import torch

_LAYOUT_MODULES = {f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem")}
_CONSTRUCTORS = {
    "builtins.set",
    "collections.OrderedDict",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",  # the name in Python 3.13
    "torch.Size",
    "torch.serialization._get_layout",
}


class _LayoutUnpickler(pickle.Unpickler):
    """Unpickles only the dataclasses and enumerations with which torch describes a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function by its name, as the overridden method does.

        Raises:
            pickle.UnpicklingError: the class or function does not belong in the layout of a checkpoint.
        """
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
    """Read the `Metadata` in the `.metadata` file of a `torch_dist` checkpoint.

    Raises:
        pickle.UnpicklingError: the file holds anything but the layout of a checkpoint.
    """
    return _LayoutUnpickler(stream).load()


def read_object(stream: BinaryIO) -> Any:
    """Read an object in a `torch_dist` checkpoint: tensors, plain containers, and the classes of Megatron's settings.

    Megatron-Core registers its classes with torch when it is imported.

    Raises:
        pickle.UnpicklingError: the object holds anything else.
    """
    return torch.load(stream, map_location="cpu", weights_only=True)
