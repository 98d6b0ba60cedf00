"""Reads tensors from `torch_dist` checkpoints of any layout of ranks, block by block and without building a model."""

import io
import pickle
from bisect import bisect_left
from collections.abc import Buffer, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from maskmoe.checkpoint.integrity import LAYOUT_FILE
from maskmoe.checkpoint.unpickling import read_layout, read_object
from maskmoe.conversion.blocks import Block, CoverageError, TensorSpec, check_cover
from maskmoe.conversion.stored_tensors import StoredTensor, check_length, read_into
from maskmoe.errors import UserError

COMMON_STATE = "common_state/shard_0_1"
"""Name of the object with the state that all ranks share, which includes Megatron's arguments."""

# Older versions of Megatron save the common state in a separate file.
_COMMON_STATE_FILE = "common.pt"


@dataclass(frozen=True)
class _Location:
    """The place of an archive of `torch.save` inside a file: position and length are in bytes."""

    path: Path
    offset: int
    length: int


class TorchDistSource:
    """Provides the tensors of a `torch_dist` checkpoint, under the names that Megatron gives them.

    A checkpoint divides each tensor into chunks, which are boxes of elements. Each chunk is an archive of `torch.save`
    inside one of the files, and the archive holds the elements uncompressed.

    Args:
        checkpoint: the checkpoint's folder.

    Attributes:
        checkpoint: the checkpoint's folder.
        tensors: shapes and dtypes of the tensors by name.
        objects: names of the pickled objects.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        try:
            with open(checkpoint / LAYOUT_FILE, "rb") as stream:
                layout = read_layout(stream)
            self.tensors = {
                name: TensorSpec(tuple(entry.size), entry.properties.dtype)
                for name, entry in layout.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            self.objects = frozenset(layout.state_dict_metadata.keys() - self.tensors.keys())
            locations = {
                (index.fqn, index.offset and tuple(index.offset)): _Location(
                    checkpoint / info.relative_path, info.offset, info.length
                )
                for index, info in layout.storage_data.items()
            }
            self._chunks = {}
            for name, spec in self.tensors.items():
                blocks = [
                    Block(name, tuple(c.offsets), tuple(c.sizes)) for c in layout.state_dict_metadata[name].chunks
                ]
                check_cover({name: spec.shape}, blocks)
                self._chunks[name] = _Chunks(
                    _Chunk(block, locations[name, block.offsets], spec.dtype) for block in blocks
                )
            self._objects = {name: locations[name, None] for name in self.objects}
        except OSError as error:
            raise UserError(f"{checkpoint} is not a readable torch_dist checkpoint: {error}") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{checkpoint}/{LAYOUT_FILE}: {error}") from error
        except CoverageError as error:
            raise UserError(f"{checkpoint} lacks a part of a tensor: {error}") from error
        except Exception as error:  # an unpickler can raise any exception on a damaged file
            raise UserError(f"{checkpoint}/{LAYOUT_FILE} is damaged") from error

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        parts = self._chunks[block.tensor].intersecting(block)
        if len(parts) == 1:
            return parts[0][0].read(block)
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for chunk, part in parts:
            result[part.slices_within(block)] = chunk.read(part)
        return result

    def read_object(self, name: str) -> Any:
        """Read a pickled object.

        Raises:
            UserError: the checkpoint has no object of this name, or the object is damaged or holds more than data.
        """
        if name not in self._objects:
            raise UserError(f"{self.checkpoint} has no {name}")
        location = self._objects[name]
        try:
            return read_object(_open_archive(location))  # pyrefly: ignore[bad-argument-type]  # any binary file will do
        except UserError:
            raise
        except Exception as error:  # an unpickler can raise any exception on a damaged file
            raise UserError(f"{name} in {location.path} is damaged, or holds more than data") from error

    def common_state(self) -> dict[str, Any]:
        """Read the state that all ranks share, such as Megatron's arguments and the iteration.

        Raises:
            UserError: the checkpoint has no such state, or the state is damaged.
        """
        file = self.checkpoint / _COMMON_STATE_FILE
        if COMMON_STATE not in self.objects and file.exists():
            return read_object(io.BytesIO(file.read_bytes()))
        return self.read_object(COMMON_STATE)[0]


@dataclass(frozen=True)
class _Chunk:
    """A block of a tensor, and the location of the archive that holds the block."""

    block: Block
    location: _Location
    dtype: torch.dtype

    def read(self, part: Block) -> Tensor:
        """Read a block that lies inside the chunk."""
        stored = self._open()
        inner = Block(part.tensor, tuple(s.start for s in part.slices_within(self.block)), part.sizes)
        return stored.read(inner) if isinstance(stored, StoredTensor) else stored[inner.slices]

    def _open(self) -> StoredTensor | Tensor:
        """Return where the chunk's elements lie in the file; the chunk itself if they are not in row-major order."""
        path = self.location.path
        what = f"a part of {self.block.tensor}"
        try:
            # Loading to the meta device reads only the archive's directory, which says where the elements lie.
            described = torch.load(_open_archive(self.location), map_location="meta", weights_only=True)
            if (tuple(described.shape), described.dtype) != (self.block.sizes, self.dtype):
                raise UserError(f"{path} is damaged: it holds another tensor than {what}")
            if not described.is_contiguous():
                return torch.load(_open_archive(self.location), map_location="cpu", weights_only=True)
            start = described.untyped_storage()._checkpoint_offset + described.storage_offset() * self.dtype.itemsize
        except UserError:
            raise
        except Exception as error:  # torch's unpickler and zip reader can raise any exception on damaged files
            raise UserError(f"{path} is damaged where it should hold {what}") from error
        return StoredTensor(path, self.location.offset + start, TensorSpec(self.block.sizes, self.dtype))


class _Chunks:
    """Finds the chunks of one tensor that hold a block.

    Args:
        chunks: all chunks of the tensor.
    """

    def __init__(self, chunks: Iterable[_Chunk]) -> None:
        self._chunks = sorted(chunks, key=lambda chunk: chunk.block.offsets)
        self._max_rows = max((chunk.block.sizes[0] for chunk in self._chunks if chunk.block.sizes), default=0)

    def intersecting(self, block: Block) -> list[tuple[_Chunk, Block]]:
        """Return each chunk that shares elements with a block, and the shared elements as a block."""
        candidates = self._chunks
        if block.sizes:  # chunks are sorted by their first row, so skip those that end before or begin after the block
            first = bisect_left(candidates, block.offsets[0] - self._max_rows + 1, key=_first_row)
            candidates = candidates[first : bisect_left(candidates, block.offsets[0] + block.sizes[0], key=_first_row)]
        return [(chunk, part) for chunk in candidates if (part := chunk.block.intersection(block))]


def _first_row(chunk: _Chunk) -> int:
    return chunk.block.offsets[0]


def _open_archive(location: _Location) -> BinaryIO:
    """Open an archive inside a file as a file of its own; see `_ArchiveStream`."""
    return cast("BinaryIO", _ArchiveStream(location))  # type stubs count only the library's own classes as files


class _ArchiveStream(io.RawIOBase):
    """Presents an archive inside a file as a file of its own.

    Args:
        location: the location of the archive.

    Raises:
        UserError: the file ends before the archive does, or cannot be opened.
    """

    def __init__(self, location: _Location) -> None:
        check_length(location.path, location.offset + location.length)
        self._location = location
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._location.length}
        self._position = origins[whence] + offset
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._location.length - self._position)]
        read_into(self._location.path, self._location.offset + self._position, view)
        self._position += len(view)
        return len(view)
