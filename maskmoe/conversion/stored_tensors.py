"""Tensors as they lie in files."""

import os
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maskmoe.conversion.blocks import Block, TensorSpec
from maskmoe.errors import UserError

# Enough for the files that hold one tensor; more might exceed the limit of the process.
_OPEN_FILES = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements lie in a file in row-major order.

    Attributes:
        path: the file.
        start: position of its first byte.
        spec: shape and dtype.
    """

    path: Path
    start: int
    spec: TensorSpec

    def read(self, part: Block) -> Tensor:
        """A part of it, `[*part.sizes]`. Reads whole rows, the part's columns and those between.

        Raises:
            UserError: the file cannot be read, or is shorter.
        """
        first, span = _rows_around(part, self.spec.shape)
        # numpy asks for huge pages, which spares most of the page faults of large new memory.
        memory = np.empty(prod(span) * self.spec.dtype.itemsize, np.uint8)
        skipped = sum(index * prod(self.spec.shape[d + 1 :]) for d, index in enumerate(first))
        read_into(self.path, self.start + skipped * self.spec.dtype.itemsize, memoryview(memory))
        rows = torch.from_numpy(memory).view(self.spec.dtype).view(span)
        return rows[tuple(slice(o - f, o - f + n) for o, f, n in zip(part.offsets, first, part.sizes, strict=True))]


def read_into(path: Path, start: int, buffer: memoryview) -> None:
    """Fill a buffer of bytes with those of a file from `start` on.

    Raises:
        UserError: the file cannot be read, or ends before.
    """
    try:
        stream = _open(path)
        while buffer:
            count = os.preadv(stream.fileno(), [buffer], start)
            if not count:
                raise UserError(f"{path} is damaged: it ends before what it should hold")
            buffer, start = buffer[count:], start + count
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def check_length(path: Path, length: int) -> None:
    """Check that a file is at least so long.

    Raises:
        UserError: it is not, or cannot be opened.
    """
    try:
        stream = _open(path)
        found = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if found < length:
        raise UserError(f"{path} is damaged: it ends before what it should hold")


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _rows_around(part: Block, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and sizes of the smallest contiguous box of a tensor that holds a part of it."""
    split = next((d for d, size in enumerate(part.sizes) if size != 1), len(shape))
    first = (*part.offsets[: split + 1], *(0 for _ in shape[split + 1 :]))
    return first, (*part.sizes[: split + 1], *shape[split + 1 :])


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: Path) -> FileIO:
    """A file, which is closed when it is out of the cache and nobody holds it: threads must, while they use it."""
    return open(path, "rb", buffering=0)
