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
"""Content of `metadata.json`, by which Megatron knows the format of a checkpoint."""

_LAYOUT_VERSION = "1.0.0"


@dataclass(frozen=True)
class TorchDistPlan:
    """A `torch_dist` checkpoint to write.

    Attributes:
        files: to write.
        layout: content of `.metadata`.
    """

    files: Sequence[PlannedFile]
    layout: bytes


@dataclass
class _File:
    """A file to which chunks are added."""

    name: str
    segments: list[Segment] = field(default_factory=list)
    size: int = 0

    def add(self, segment: Segment, length: int) -> _StorageInfo:
        place = _StorageInfo(self.name, self.size, length)
        self.segments.append(segment)
        self.size += length
        return place


def plan_torch_dist(
    tensors: Mapping[str, TensorSpec], objects: Mapping[str, Any], most_bytes: int, folder: str
) -> TorchDistPlan:
    """Plan a checkpoint: tensors as chunks of a few MiB each, archives of `torch.save` one after the other.

    Args:
        tensors: by the names that Megatron loads them by.
        objects: to be pickled, by name with the suffix of their shard.
        most_bytes: of a file, about.
        folder: of the checkpoint, in the output.
    """
    files = [_File("__0_0.distcp")]
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for name, value in objects.items():
        archive = _archive(value)
        entries[name] = BytesStorageMetadata()
        places[MetadataIndex(name)] = files[-1].add(Segment(archive), len(archive))
    for name, spec in tensors.items():
        chunks = list(row_major_blocks(name, spec, BLOCK_BYTES))
        for block in chunks:
            head, tail = _around_elements(block.sizes, spec.dtype)
            length = len(head) + block.num_elements * spec.dtype.itemsize + len(tail)
            if files[-1].size + length > most_bytes and files[-1].segments:
                files.append(_File(f"__0_{len(files)}.distcp"))
            place = files[-1].add(Segment(head, block, tail), length)
            places[MetadataIndex(name, torch.Size(block.offsets))] = place
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype),
            torch.Size(spec.shape),
            [ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes)) for block in chunks],
        )
    layout = Metadata(
        entries, storage_data=places, storage_meta=StorageMeta(save_id=str(uuid.uuid4())), version=_LAYOUT_VERSION
    )
    planned = [PlannedFile(f"{folder}/{file.name}", file.segments, file.size) for file in files]
    return TorchDistPlan(planned, pickle.dumps(layout))


def _archive(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@cache
def _around_elements(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the elements of a tensor.

    It does not depend on the elements but for their checksum, which `torch.load` does not look at, and which
    `integrity.json` makes superfluous.
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
