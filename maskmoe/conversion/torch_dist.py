"""Reads `torch_dist` checkpoints of any layout of ranks in blocks, and plans checkpoints for any layout of ranks."""

import io
import pickle
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view
from torch.utils.serialization import config

from maskmoe.checkpoint.integrity import LAYOUT_FILE, read_checkpoint_layout
from maskmoe.conversion.blocks import (
    Block,
    Copy,
    CoverageError,
    RearrangedSource,
    StoredTensor,
    TensorSpec,
    row_major_blocks,
)
from maskmoe.conversion.writing import BLOCK_BYTES, PlannedFile
from maskmoe.errors import UserError

COMMON_STATE = "common_state/shard_0_1"
"""Name of the object with the state that all ranks share, which includes Megatron's arguments."""

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json`, which tells Megatron the format of a checkpoint."""


class TorchDistSource(RearrangedSource):
    """Provides the tensors of a `torch_dist` checkpoint, under the names that Megatron gives them.

    Args:
        checkpoint: the checkpoint's folder.

    Attributes:
        checkpoint: the checkpoint's folder.
        tensors: shapes and dtypes of the tensors by name.

    Raises:
        UserError: the checkpoint is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        tensors: dict[str, TensorSpec] = {}
        chunks: dict[str, TensorSpec] = {}
        locations: dict[str, _StorageInfo] = {}
        copies = []
        layout = read_checkpoint_layout(checkpoint)
        try:
            for name, entry in layout.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata):
                    tensors[name] = TensorSpec(tuple(entry.size), entry.properties.dtype)
                    for chunk in entry.chunks if tensors[name].num_bytes else ():
                        target = Block(name, tuple(chunk.offsets), tuple(chunk.sizes))
                        source = Block.whole(f"{name}{[*chunk.offsets]}", chunk.sizes)
                        chunks[source.tensor] = TensorSpec(target.sizes, entry.properties.dtype)
                        locations[source.tensor] = layout.storage_data[MetadataIndex(name, chunk.offsets)]
                        copies.append(Copy(source, target))
            shapes = {name: spec.shape for name, spec in tensors.items() if spec.num_bytes}
            self._common_state = layout.storage_data.get(MetadataIndex(COMMON_STATE))
            super().__init__(_ChunkSource(checkpoint, chunks, locations), shapes, copies)
        except CoverageError as error:
            raise UserError(f"{checkpoint} lacks a part of a tensor: {error}") from error
        except Exception as error:  # a damaged layout can have attributes of any type
            raise UserError(f"{checkpoint}/{LAYOUT_FILE} is damaged") from error
        self.tensors = tensors  # includes tensors without elements, whose blocks need no chunk

    def common_state(self) -> dict[str, Any]:
        """Read the state that all ranks share, such as Megatron's arguments and the iteration.

        Raises:
            UserError: the checkpoint has no such state, or the state is damaged or holds more than data.
        """
        try:
            if self._common_state is None:  # older versions of Megatron save this state in a file of its own
                return torch.load(self.checkpoint / "common.pt", map_location="cpu", weights_only=True)
            return _load_archive(self.checkpoint, self._common_state, "cpu")[0]
        except Exception as error:  # an unpickler can raise any exception on a damaged file
            raise UserError(f"{self.checkpoint}: {COMMON_STATE} is missing, damaged or not just data") from error


class _ChunkSource:
    """Provides each chunk of a checkpoint's tensors as a tensor.

    Each chunk is an archive of `torch.save` inside one of the files, and the archive holds the elements uncompressed.

    Args:
        checkpoint: the checkpoint's folder.
        tensors: shapes and dtypes of the chunks by name.
        locations: where each chunk is stored.
    """

    def __init__(self, checkpoint: Path, tensors: dict[str, TensorSpec], locations: dict[str, _StorageInfo]) -> None:
        self._checkpoint = checkpoint
        self._locations = locations
        self.tensors = tensors

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`."""
        location, spec = self._locations[block.tensor], self.tensors[block.tensor]
        path = self._checkpoint / location.relative_path
        try:
            # Loading to the meta device reads only the archive's directory, which says where the elements lie.
            chunk = _load_archive(self._checkpoint, location, "meta")
            start = location.offset + chunk.untyped_storage()._checkpoint_offset
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except Exception as error:  # torch's unpickler and zip reader can raise any exception on damaged files
            raise UserError(f"{path} is damaged where it should hold {block.tensor}") from error
        if (tuple(chunk.shape), chunk.dtype) != (spec.shape, spec.dtype):
            raise UserError(f"{path} is damaged: it holds another tensor than {block.tensor}")
        return StoredTensor(path, start, chunk).read(block)


def _load_archive(checkpoint: Path, location: _StorageInfo, device: str) -> Any:
    """Load an object from an archive inside one of a checkpoint's files; its tensors go to a device."""
    with open(checkpoint / location.relative_path, "rb") as file:
        # The view has all methods of a binary file, but its class is only declared to be an `IOBase`.
        archive = cast("BinaryIO", _create_file_view(file, location.offset, location.length))
        return torch.load(archive, map_location=device, weights_only=True)


def plan_torch_dist(
    tensors: Mapping[str, TensorSpec], objects: Mapping[str, Any], max_file_bytes: int, folder: str
) -> tuple[list[PlannedFile], bytes]:
    """Plan a checkpoint whose files are archives of `torch.save` one after the other, one for each object and chunk.

    Args:
        tensors: shapes and dtypes by Megatron's names. Each tensor becomes chunks of at most `BLOCK_BYTES`.
        objects: values to pickle, by name including the suffix of their shard.
        max_file_bytes: upper bound of a file's size in bytes, unless one chunk or object is larger.
        folder: name of the checkpoint's folder in the output.

    Returns:
        the files, and the content of the file `.metadata`, which says where each tensor lies.
    """
    files: list[PlannedFile] = []
    entries: dict[str, TensorStorageMetadata | metadata.BytesStorageMetadata] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}

    def place(index: MetadataIndex, parts: Sequence[bytes | Block], length: int) -> None:
        """Append an archive of `length` bytes to the last file, or to a new file if the last file is full."""
        if not files or files[-1].size + length > max_file_bytes:
            files.append(PlannedFile(f"{folder}/__0_{len(files)}.distcp", [], 0))
        locations[index] = _StorageInfo(Path(files[-1].name).name, files[-1].size, length)
        files[-1].parts += parts
        files[-1].size += length

    for name, value in objects.items():
        archive = _archive(value)
        place(MetadataIndex(name), [archive], len(archive))
        entries[name] = metadata.BytesStorageMetadata()
    for name, spec in tensors.items():
        chunks = []
        for block in row_major_blocks(name, spec, BLOCK_BYTES):
            head, tail = _around_elements(block.sizes, spec.dtype)
            chunk = metadata.ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
            length = len(head) + block.num_elements * spec.dtype.itemsize + len(tail)
            place(MetadataIndex(name, chunk.offsets), [head, block, tail], length)
            chunks.append(chunk)
        entries[name] = TensorStorageMetadata(
            metadata.TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), chunks
        )
    layout = metadata.Metadata(entries, storage_data=locations, version=CURRENT_DCP_VERSION)
    return files, pickle.dumps(layout)


def _archive(value: Any) -> bytes:
    """Return what `torch.save` writes for a value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@cache
def _around_elements(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """Return the bytes that `torch.save` writes before and after the elements of a tensor.

    These bytes depend on the elements only through a checksum, so the checksum is left out: `torch.load` ignores it,
    and `integrity.json` holds a better one.

    Args:
        sizes: shape of the tensor.
        dtype: dtype of the tensor.
    """
    with config.patch("save.compute_crc32", False):  # pyrefly: ignore[missing-attribute]  # torch installs it
        archive = _archive(torch.zeros(sizes, dtype=dtype))
    described = torch.load(io.BytesIO(archive), map_location="meta", weights_only=True)
    start = described.untyped_storage()._checkpoint_offset
    return archive[:start], archive[start + described.nbytes :]
