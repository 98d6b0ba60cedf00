"""Reads the pickled parts of `torch_dist` checkpoints without running what they might hold.

A checkpoint may come from a stranger. torch unpickles its `.metadata` and its objects without restraint, which lets a
crafted file run any code. Here nothing but data can come out.
"""

import dataclasses
import enum
import io
import pickle
from typing import Any, BinaryIO

import torch
from megatron.core.safe_globals import register_safe_globals

_LAYOUT_MODULES = frozenset(
    f"torch.distributed.checkpoint.{module}" for module in ("metadata", "planner", "filesystem")
)
_CONSTRUCTORS = frozenset(
    [
        ("builtins", "set"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # the name in Python 3.13
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
    ]
)


class _LayoutUnpickler(pickle.Unpickler):
    """Knows only the dataclasses and enumerations in which torch describes a checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CONSTRUCTORS:
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
    """The `Metadata` in the `.metadata` file of a `torch_dist` checkpoint.

    Raises:
        pickle.UnpicklingError: it holds anything but a checkpoint's layout.
    """
    return _LayoutUnpickler(stream).load()


def read_object(stream: io.BytesIO) -> Any:
    """An object in a `torch_dist` checkpoint: tensors, plain containers and the settings' own classes.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    register_safe_globals()
    return torch.load(stream, map_location="cpu", weights_only=True)
