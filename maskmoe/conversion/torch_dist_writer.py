"""Plans `torch_dist` checkpoints that Megatron loads in any layout of ranks."""

import io
import pickle
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from maskmoe.conversion.blocks import TensorSpec, row_major_blocks
from maskmoe.conversion.writing import BLOCK_BYTES, PlannedFile, Segment

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json`, which tells Megatron the format of a checkpoint."""

_LAYOUT_VERSION = "1.0.0"


@dataclass(frozen=True)
class TorchDistPlan:
    """A `torch_dist` checkpoint that is yet to be written.

    Attributes:
        files: the files with tensors and objects.
        layout: content of the file `.metadata`, which says where each tensor lies.
    """

    files: Sequence[PlannedFile]
    layout: bytes


@dataclass
class _FilePlan:
    """A file of a checkpoint that is being planned.

    Attributes:
        name: name of the file.
        segments: the file's content so far, in order.
        size: bytes of `segments`.
    """

    name: str
    segments: list[Segment] = field(default_factory=list)
    size: int = 0

    def add(self, segment: Segment, length: int) -> _StorageInfo:
        """Append a segment of `length` bytes; return where it lies."""
        location = _StorageInfo(self.name, self.size, length)
        self.segments.append(segment)
        self.size += length
        return location


def plan_torch_dist(
    tensors: Mapping[str, TensorSpec], objects: Mapping[str, Any], max_file_bytes: int, folder: str
) -> TorchDistPlan:
    """Plan a checkpoint whose files are archives of `torch.save` one after the other, one for each object and chunk.

    Args:
        tensors: shapes and dtypes by Megatron's names. Each tensor becomes chunks of at most `BLOCK_BYTES`.
        objects: values to pickle, by name including the suffix of their shard.
        max_file_bytes: upper bound of a file's size in bytes, unless one chunk or the objects are larger.
        folder: name of the checkpoint's folder in the output.
    """
    files = [_FilePlan("__0_0.distcp")]
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    for name, value in objects.items():
        archive = _archive(value)
        entries[name] = BytesStorageMetadata()
        locations[MetadataIndex(name)] = files[-1].add(Segment(archive), len(archive))
    for name, spec in tensors.items():
        chunks = list(row_major_blocks(name, spec, BLOCK_BYTES))
        for block in chunks:
            head, tail = _around_elements(block.sizes, spec.dtype)
            length = len(head) + block.num_elements * spec.dtype.itemsize + len(tail)
            if files[-1].size + length > max_file_bytes and files[-1].segments:
                files.append(_FilePlan(f"__0_{len(files)}.distcp"))
            location = files[-1].add(Segment(head, block, tail), length)
            locations[MetadataIndex(name, torch.Size(block.offsets))] = location
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype),
            torch.Size(spec.shape),
            [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes)) for block in chunks],
        )
    layout = Metadata(
        entries, storage_data=locations, storage_meta=StorageMeta(save_id=str(uuid.uuid4())), version=_LAYOUT_VERSION
    )
    planned = [PlannedFile(f"{folder}/{file.name}", file.segments, file.size) for file in files]
    return TorchDistPlan(planned, pickle.dumps(layout))


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
    compute_checksums = get_crc32_options()
    set_crc32_options(False)
    try:
        archive = _archive(torch.zeros(sizes, dtype=dtype))
    finally:
        set_crc32_options(compute_checksums)
    described = torch.load(io.BytesIO(archive), map_location="meta", weights_only=True)
    start = described.untyped_storage()._checkpoint_offset
    return archive[:start], archive[start + described.nbytes :]
