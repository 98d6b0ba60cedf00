"""Reads tensors, or blocks of them, from where their elements lie in files."""

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

# Enough for the files that hold one tensor. More open files might exceed the limit of the process.
_OPEN_FILES = 64


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose elements lie in a file in row-major order.

    Attributes:
        path: the file.
        start: position of the tensor's first byte in the file.
        spec: shape and dtype.
    """

    path: Path
    start: int
    spec: TensorSpec

    def read(self, part: Block) -> Tensor:
        """Read a block of the tensor.

        The read covers one contiguous range of the file, which includes the columns between the block's rows.

        Returns:
            a tensor of the shape `part.sizes`.

        Raises:
            UserError: the file cannot be read, or ends before the block does.
        """
        first, span = _rows_around(part, self.spec.shape)
        # numpy asks the kernel for huge pages, which avoids most page faults of large new arrays.
        memory = np.empty(prod(span) * self.spec.dtype.itemsize, np.uint8)
        skipped = sum(index * prod(self.spec.shape[d + 1 :]) for d, index in enumerate(first))
        read_into(self.path, self.start + skipped * self.spec.dtype.itemsize, memoryview(memory))
        rows = torch.from_numpy(memory).view(self.spec.dtype).view(span)
        return rows[tuple(slice(o - f, o - f + n) for o, f, n in zip(part.offsets, first, part.sizes, strict=True))]


def read_into(path: Path, start: int, buffer: memoryview) -> None:
    """Fill a buffer with the bytes of a file from position `start` on.

    Raises:
        UserError: the file cannot be read, or ends before the buffer is full.
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
    """Check that a file has at least `length` bytes.

    Raises:
        UserError: the file is shorter, or cannot be opened.
    """
    try:
        stream = _open(path)
        size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if size < length:
        raise UserError(f"{path} is damaged: it ends before what it should hold")


def byte_view(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor in host memory, without a copy."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _rows_around(part: Block, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return offsets and sizes of the smallest box that contains a block and is contiguous in memory."""
    split = next((d for d, size in enumerate(part.sizes) if size != 1), len(shape))
    first = (*part.offsets[: split + 1], *(0 for _ in shape[split + 1 :]))
    return first, (*part.sizes[: split + 1], *shape[split + 1 :])


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: Path) -> FileIO:
    """Open a file, or return it if it is open already.

    A file is closed when it has left the cache and nothing refers to it. A thread must therefore hold the returned
    object while it uses the file's descriptor.
    """
    return open(path, "rb", buffering=0)
