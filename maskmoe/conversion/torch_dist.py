"""Reads tensors out of `torch_dist` checkpoints, of whatever layout of ranks, without a model and piece by piece."""

import io
import pickle
from bisect import bisect_left
from collections.abc import Buffer, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from maskmoe.checkpoint.integrity import LAYOUT_FILE
from maskmoe.checkpoint.unpickling import read_layout, read_object
from maskmoe.conversion.blocks import Block, TensorSpec, UncoveredTensor, check_cover
from maskmoe.conversion.stored_tensors import StoredTensor, check_length, read_into
from maskmoe.errors import UserError

COMMON_STATE = "common_state/shard_0_1"
"""The object that holds what all ranks have in common, among it Megatron's arguments."""

_LEGACY_COMMON_STATE_FILE = "common.pt"


@dataclass(frozen=True)
class _Place:
    """Where an archive of `torch.save` lies."""

    path: Path
    offset: int
    length: int


class TorchDistSource:
    """The tensors of a `torch_dist` checkpoint, under the names that Megatron saves them by.

    A checkpoint holds each tensor as chunks, boxes of its elements. Every chunk is an archive of `torch.save` inside
    one of the files, in which its elements lie as they are.

    Args:
        checkpoint: the checkpoint's folder.

    Attributes:
        tensors: by name.
        objects: names of the pickled objects.

    Raises:
        UserError: it is no sound checkpoint.
    """

    def __init__(self, checkpoint: Path):
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
            places = {
                (index.fqn, index.offset and tuple(index.offset)): _Place(
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
                self._chunks[name] = _Chunks(_Chunk(block, places[name, block.offsets], spec.dtype) for block in blocks)
            self._objects = {name: places[name, None] for name in self.objects}
        except OSError as error:
            raise UserError(f"{checkpoint} is not a readable torch_dist checkpoint: {error}") from error
        except pickle.UnpicklingError as error:
            raise UserError(f"{checkpoint}/{LAYOUT_FILE}: {error}") from error
        except UncoveredTensor as error:
            raise UserError(f"{checkpoint} lacks a part of a tensor: {error}") from error
        except Exception as error:  # whatever an unpickler meets in a damaged file
            raise UserError(f"{checkpoint}/{LAYOUT_FILE} is damaged") from error

    def read(self, block: Block) -> Tensor:
        """See `TensorSource`."""
        parts = self._chunks[block.tensor].intersecting(block)
        if len(parts) == 1:
            return parts[0][0].read(block)
        result = torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype)
        for chunk, wanted in parts:
            result[wanted.within(block)] = chunk.read(wanted)
        return result

    def read_object(self, name: str) -> Any:
        """A pickled object.

        Raises:
            UserError: there is none of this name, or it holds other than data.
        """
        if name not in self._objects:
            raise UserError(f"{self.checkpoint} has no {name}")
        place = self._objects[name]
        try:
            return read_object(_Slice(place))
        except UserError:
            raise
        except Exception as error:  # as above
            raise UserError(f"{name} in {place.path} is damaged, or holds other than data") from error

    def common_state(self) -> dict[str, Any]:
        """What all ranks have in common: Megatron's arguments, the iteration and such.

        Raises:
            UserError: there is none.
        """
        legacy = self.checkpoint / _LEGACY_COMMON_STATE_FILE
        if COMMON_STATE not in self.objects and legacy.exists():
            return read_object(io.BytesIO(legacy.read_bytes()))
        return self.read_object(COMMON_STATE)[0]


@dataclass(frozen=True)
class _Chunk:
    """A box of a tensor's elements, and the archive that holds it."""

    block: Block
    place: _Place
    dtype: torch.dtype

    def read(self, wanted: Block) -> Tensor:
        """The elements of a block inside the box."""
        stored = self._locate()
        part = Block(wanted.tensor, tuple(s.start for s in wanted.within(self.block)), wanted.sizes)
        return stored.read(part) if isinstance(stored, StoredTensor) else stored[part.slices]

    def _locate(self) -> StoredTensor | Tensor:
        """Where the box lies in a file; the box itself if its elements do not lie in order."""
        what = f"a part of {self.block.tensor}"
        try:
            # On the meta device nothing but the description is read, and where the elements are.
            described = torch.load(_Slice(self.place), map_location="meta", weights_only=True)
            if (tuple(described.shape), described.dtype) != (self.block.sizes, self.dtype):
                raise UserError(f"{self.place.path} is damaged: it holds another tensor than {what}")
            if not described.is_contiguous():
                return torch.load(_Slice(self.place), map_location="cpu", weights_only=True)
            start = described.untyped_storage()._checkpoint_offset + described.storage_offset() * self.dtype.itemsize
        except UserError:
            raise
        except Exception as error:  # whatever torch's unpickler and zip reader meet in damaged files
            raise UserError(f"{self.place.path} is damaged where it should hold {what}") from error
        return StoredTensor(self.place.path, self.place.offset + start, TensorSpec(self.block.sizes, self.dtype))


class _Chunks:
    """The chunks of one tensor, to be found by where they are in it."""

    def __init__(self, chunks: Iterable[_Chunk]):
        self._chunks = sorted(chunks, key=lambda chunk: chunk.block.offsets)
        self._longest = max((chunk.block.sizes[0] for chunk in self._chunks if chunk.block.sizes), default=0)

    def intersecting(self, block: Block) -> list[tuple[_Chunk, Block]]:
        """The chunks that share elements with a block, and which."""
        candidates = self._chunks
        if block.sizes:
            first = bisect_left(candidates, block.offsets[0] - self._longest + 1, key=_first_row)
            candidates = candidates[first : bisect_left(candidates, block.offsets[0] + block.sizes[0], key=_first_row)]
        return [(chunk, wanted) for chunk in candidates if (wanted := chunk.block.intersection(block))]


def _first_row(chunk: _Chunk) -> int:
    return chunk.block.offsets[0]


class _Slice(io.RawIOBase):
    """An archive inside a file, as a file.

    Raises:
        UserError: the file ends before the archive, or cannot be opened.
    """

    def __init__(self, place: _Place):
        check_length(place.path, place.offset + place.length)
        self._place = place
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._place.length}[whence]
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._place.length - self._position)]
        read_into(self._place.path, self._place.offset + self._position, view)
        self._position += len(view)
        return len(view)
