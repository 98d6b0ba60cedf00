"""Reads and writes `torch_dist` checkpoints block by block, with the readers and writers of torch."""

import warnings
from collections.abc import Mapping
from itertools import batched
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import load_common_state_dict
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from maskmoe.checkpoint.integrity import LAYOUT_FILE, read_checkpoint_layout
from maskmoe.conversion.blocks import BLOCK_BYTES, Block, CoverageError, TensorSpec, check_cover, row_major_blocks
from maskmoe.conversion.tensor_sources import TensorSource
from maskmoe.errors import UserError

COMMON_STATE = "common_state/shard_0_1"
"""Name of the object with the state that all ranks share, which includes Megatron's arguments."""

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json`, which tells Megatron the format of a checkpoint."""


class TorchDistSource:
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
        layout = read_checkpoint_layout(checkpoint)
        try:
            entries = layout.state_dict_metadata.items()
            self._entries = {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}
            self.tensors = {
                name: TensorSpec(tuple(entry.size), entry.properties.dtype) for name, entry in self._entries.items()
            }
            chunks = [
                Block(name, tuple(chunk.offsets), tuple(chunk.sizes))
                for name, entry in self._entries.items()
                for chunk in entry.chunks
            ]
            check_cover({name: spec.shape for name, spec in self.tensors.items()}, chunks)
        except CoverageError as error:
            raise UserError(f"{checkpoint} lacks a part of a tensor: {error}") from error
        except Exception as error:  # a damaged layout can have attributes of any type
            raise UserError(f"{checkpoint}/{LAYOUT_FILE} is damaged") from error
        self._reader = FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(layout, is_coordinator=False)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`. The chunks that hold the block, each of which one rank has saved, are read whole."""
        planner = _BlockLoader(torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype))
        target = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
        try:
            items = create_read_items_for_chunk_list(block.tensor, self._entries[block.tensor], [target])
            self._reader.read_data(LoadPlan(items), planner).wait()
        except OSError as error:
            raise UserError(f"{error.filename or self.checkpoint} cannot be read: {error.strerror}") from error
        except Exception as error:  # torch's unpickler and zip reader can raise any exception on damaged files
            raise UserError(f"{self.checkpoint} is damaged where it should hold {block.tensor}") from error
        return planner.target

    def common_state(self) -> dict[str, Any]:
        """Read the state that all ranks share, such as Megatron's arguments and the iteration.

        Raises:
            UserError: the checkpoint has no such state, or the state is damaged or holds more than data.
        """
        try:
            with warnings.catch_warnings(action="ignore"):  # torch would warn that this is a single process
                return load_common_state_dict(self.checkpoint)
        except BaseException as error:  # an unpickler can raise any exception on a damaged file
            if not isinstance(error, Exception) and not hasattr(error, "failures"):
                raise
            raise UserError(f"{self.checkpoint}: {COMMON_STATE} is missing, damaged or not just data") from error


class _BlockLoader(DefaultLoadPlanner):
    """Tells torch's reader to fill one tensor.

    Args:
        target: the tensor to fill.
    """

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor to fill; overrides the search in a state dict."""
        return self.target


class _BlockSaver(DefaultSavePlanner):
    """Provides torch's writer with objects, and with blocks of tensors that are read when they are written.

    Args:
        source: provides the blocks.
        blocks: the blocks by torch's index of a chunk.
        objects: the objects by name.
    """

    def __init__(self, source: TensorSource, blocks: Mapping[MetadataIndex, Block], objects: Mapping[str, Any]) -> None:
        super().__init__()
        self._source, self._blocks, self._objects = source, blocks, objects

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return an object or a block of a tensor; overrides the search in a state dict."""
        return self._source.read(self._blocks[index]) if index in self._blocks else self._objects[index.fqn]


def write_torch_dist(
    source: TensorSource, objects: Mapping[str, Any], checkpoint: Path, max_file_bytes: int
) -> list[str]:
    """Write a checkpoint without the files `metadata.json` and `integrity.json`.

    One block is in memory at a time. The objects come first in a file of their own, the tensors in files like those of
    several ranks.

    Args:
        source: provides the tensors, by Megatron's names. Each becomes chunks of at most `BLOCK_BYTES`.
        objects: values to pickle, by name including the suffix of their shard.
        checkpoint: the folder of the checkpoint.
        max_file_bytes: upper bound of the bytes of tensors in a file, unless one chunk alone is larger.

    Returns:
        the names of the files.
    """
    # Describe the chunks of all tensors as torch does.
    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
        name: BytesStorageMetadata() for name in objects
    }
    items, blocks = [], {}
    for name, spec in source.tensors.items():
        properties, size = TensorProperties(dtype=spec.dtype), torch.Size(spec.shape)
        chunks = []
        for block in row_major_blocks(name, spec, BLOCK_BYTES):
            chunk = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
            index = MetadataIndex(name, chunk.offsets)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(chunk, properties, size)))
            blocks[index] = block
            chunks.append(chunk)
        entries[name] = TensorStorageMetadata(properties, size, chunks)
    # Write one file for each plan, as if each plan were a rank's.
    of_objects = [WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in objects]
    of_tensors = batched(items, max(1, max_file_bytes // BLOCK_BYTES))
    writer, planner = FileSystemWriter(checkpoint, per_thread_copy_ahead=0), _BlockSaver(source, blocks, objects)
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [SavePlan(list(plan)) for plan in (of_objects, *of_tensors) if plan]
    checkpoint.mkdir(parents=True, exist_ok=True)
    results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(Metadata(entries), results)
    return sorted({write.storage_data.relative_path for writes in results for write in writes} | {LAYOUT_FILE})
