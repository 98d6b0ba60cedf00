"""Opens `torch_dist` checkpoints as models in transformers' format, and writes such models, block by block."""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from itertools import batched
from pathlib import Path
from typing import Any

import torch
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
from tqdm import tqdm

from maskmoe.checkpoint.integrity import COMPLETION_FILE, Manifest
from maskmoe.checkpoint.read_routing_mask import CHECKPOINT_PREFIX
from maskmoe.checkpoint.reading import LAYOUT_FILE, read_checkpoint_layout, read_common_state
from maskmoe.checkpoint.saved_names import saved_pattern
from maskmoe.checkpoint.series import RELEASE, write_tracker
from maskmoe.conversion.config_mapping import config_from_args, is_hybrid, is_stacked
from maskmoe.conversion.model_tensors import (
    ROUTING_MASK_PREFIX,
    OpenedModel,
    check_tensors,
    read_mask,
    routing_mask_tensors,
)
from maskmoe.conversion.tensor_mapping import (
    EXPERT_NORMS,
    PADDING_PREFIX,
    MegatronLayout,
    map_tensors,
)
from maskmoe.conversion.tensor_sources import (
    BLOCK_BYTES,
    Block,
    Copy,
    JoinedSource,
    MemorySource,
    RearrangedSource,
    TensorSource,
    TensorSpec,
    check_cover,
    row_major_blocks,
)
from maskmoe.conversion.tokenizer import WITHOUT_TEXT
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_record import TOKENIZER_TYPES
from maskmoe.errors import UserError
from maskmoe.files.parsing import reading
from maskmoe.routing_mask.mask import RoutingMask

COMMON_STATE = "common_state/shard_0_1"
"""Name of the object with the state that all ranks share, which includes Megatron's arguments."""

MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""Content of `metadata.json`, which tells Megatron the format of a checkpoint."""


class TorchDistSource:
    """Provides the tensors of a `torch_dist` checkpoint, under the names that Megatron gives them.

    Args:
        checkpoint: The checkpoint's folder.

    Attributes:
        checkpoint: The checkpoint's folder.
        tensors: Shapes and dtypes of the tensors by name.

    Raises:
        UserError: The checkpoint is missing or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        layout = read_checkpoint_layout(checkpoint)
        with reading(f"{checkpoint}/{LAYOUT_FILE}"):  # a damaged layout can have attributes of any type
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
        self._reader = FileSystemReader(checkpoint)
        self._reader.set_up_storage_reader(layout, is_coordinator=False)

    def read(self, block: Block) -> Tensor:
        """See `TensorSource.read`. The chunks that hold the block, each of which one rank has saved, are read whole."""
        planner = _BlockLoader(torch.empty(block.sizes, dtype=self.tensors[block.tensor].dtype))
        target = ChunkStorageMetadata(torch.Size(block.offsets), torch.Size(block.sizes))
        with reading(f"{block.tensor} in {self.checkpoint}"):  # torch raises any exception on damaged files
            items = create_read_items_for_chunk_list(block.tensor, self._entries[block.tensor], [target])
            self._reader.read_data(LoadPlan(items), planner).wait()
        return planner.target


class _BlockLoader(DefaultLoadPlanner):
    """Tells torch's reader to fill one tensor.

    Args:
        target: The tensor to fill.
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
        source: Provides the blocks.
        blocks: The blocks by torch's index of a chunk.
        objects: The objects by name.
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
        source: Provides the tensors, by Megatron's names. Each becomes chunks of at most `BLOCK_BYTES`.
        objects: Values to pickle, by name including the suffix of their shard.
        checkpoint: The folder of the checkpoint.
        max_file_bytes: Upper bound of the bytes of tensors in a file, unless one chunk alone is larger.

    Returns:
        The names of the files.
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
    writer.path = str(checkpoint)  # enters the layout, and Python 3.12 cannot read the paths that Python 3.13 pickles
    writer.set_up_storage_writer(is_coordinator=True)
    plans = [SavePlan(list(plan)) for plan in (of_objects, *of_tensors) if plan]
    checkpoint.mkdir(parents=True, exist_ok=True)
    progress = tqdm(writer.prepare_global_plan(plans), "writing", unit="file")
    results = [writer.write_data(plan, planner).wait() for plan in progress]
    writer.finish(Metadata(entries), results)
    return sorted({write.storage_data.relative_path for writes in results for write in writes} | {LAYOUT_FILE})


# Entry of a converted checkpoint's common state: the configuration of the transformers model.
_CONFIG = "huggingface_config"
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")


def open_megatron(
    checkpoint: Path, mask: RoutingMask | None = None, changed_args: Mapping[str, Any] | None = None
) -> OpenedModel:
    """Open a checkpoint of any layout of ranks as a transformers model, including the padding of the vocabulary.

    Args:
        checkpoint: The checkpoint's folder.
        mask: The routing mask for a checkpoint that holds none.
        changed_args: Megatron's arguments, by name, that replace the checkpoint's.

    Raises:
        UserError: The checkpoint is damaged, transformers cannot express the model, or the checkpoint's tensors do not
            match its arguments.
    """
    source: TensorSource = TorchDistSource(checkpoint)
    common = read_common_state(checkpoint)
    original_args = common.get("args")
    if not isinstance(original_args, Namespace):
        raise UserError(f"{checkpoint} holds no arguments of Megatron, which say what its tensors are")
    args = Namespace(**vars(original_args) | dict(changed_args or {}))
    args.hybrid_layer_pattern = saved_pattern(args)
    vars(args).pop("hybrid_override_pattern", None)  # else a GPT checkpoint made from the model would seem hybrid
    # Add the routing mask to a checkpoint that has none.
    has_mask = f"{CHECKPOINT_PREFIX}row_of_id" in source.tensors
    if mask is not None:
        if has_mask or not args.num_experts:
            problem = "holds a routing mask" if has_mask else "has no experts"
            raise UserError(f"{checkpoint} {problem}; leave --routing-mask out")
        source = JoinedSource(source, routing_mask_tensors(mask, CHECKPOINT_PREFIX, for_megatron=True)[0])
    elif args.num_experts and not has_mask:
        raise UserError(
            f"{checkpoint} holds no routing mask; pass the one that its experts should route by, --routing-mask"
        )
    # Describe the model, and map its tensors.
    mask = read_mask(source, CHECKPOINT_PREFIX)
    config = common.get(_CONFIG, {})
    vocab_size = mask.vocab_size if mask else config.get("vocab_size") or _vocab_size(original_args, args)
    config |= config_from_args(args, vocab_size)
    config["routing_mask"] = routing_mask_tensors(mask)[1] if mask else None
    weights = {name: spec for name, spec in source.tensors.items() if not _OPTIMIZER.match(name)}
    local, transformer_engine = EXPERT_NORMS
    norm = transformer_engine if any(name.endswith(transformer_engine) for name in weights) else local
    stacked = not any(name.startswith("decoder.layers.0.") for name in weights)
    mapping = map_tensors(config, MegatronLayout(stacked, args.padded_vocab_size, norm, is_hybrid(args)))
    # Checkpoints that version 0.2.1 or older converted hold the norm before experts under both of its names.
    aliases = {name for name in weights if name.replace(local, transformer_engine) in mapping.megatron}
    check_tensors(weights, mapping.megatron, str(checkpoint), ignored=aliases)
    view: TensorSource = RearrangedSource(source, mapping.huggingface, mapping.copies)
    if mask is not None:
        view = JoinedSource(routing_mask_tensors(mask)[0], view)
    return OpenedModel(view, config, args)


def write_megatron(model: OpenedModel, args: Namespace, folder: Path, max_file_bytes: int) -> None:
    """Write a model as a checkpoint that training starts from, in any layout of ranks.

    Args:
        model: The model. If its source does not provide the padding of the vocabulary, the padding is zeros.
        args: Megatron's arguments of the model, which the checkpoint will hold.
        folder: The folder for the checkpoint `release` and for the tracker file that names it.
        max_file_bytes: Upper bound of a file's size in bytes.

    Raises:
        UserError: The model's tensors do not fit into Megatron's.
    """
    # Map the tensors. The padding of the vocabulary is the model's own if it fits, else zeros.
    layout = MegatronLayout(is_stacked(args), args.padded_vocab_size, is_hybrid=is_hybrid(args))
    tensors = model.source.tensors
    dtype = tensors["model.embed_tokens.weight"].dtype
    mapping = map_tensors(model.config, layout)
    zero = torch.zeros((), dtype=dtype)
    zeros = {
        name: zero.expand(shape)
        for name, shape in mapping.huggingface.items()
        if name.startswith(PADDING_PREFIX) and tensors.get(name) != TensorSpec(shape, dtype)
    }
    source = JoinedSource(MemorySource(zeros), model.source)
    if mask := read_mask(model.source, ROUTING_MASK_PREFIX):
        source = JoinedSource(routing_mask_tensors(mask, for_megatron=True)[0], source)
    copies = (Copy(copy.target, copy.source) for copy in mapping.copies)
    view = RearrangedSource(source, mapping.megatron, copies)
    # Write them with the state that Megatron's loader requires. A module whose `_extra_state` is missing keeps its own.
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        _CONFIG: model.config,
    }
    checkpoint = folder / RELEASE
    files = write_torch_dist(view, {COMMON_STATE: [common]}, checkpoint, max_file_bytes)
    Manifest.of_files(checkpoint, files).save(checkpoint)
    (checkpoint / COMPLETION_FILE).write_text(json.dumps(MARKER))
    write_tracker(folder, RELEASE)


def _vocab_size(original_args: Namespace, args: Namespace) -> int:
    """Return the number of ids of a model that has no routing mask and was trained by Megatron.

    Args:
        original_args: Megatron's arguments in the checkpoint.
        args: These arguments with the tokenizer that the user passed.

    Returns:
        The number of the tokenizer's ids; for a type that MaskMoE cannot read, the number of rows including padding.

    Raises:
        UserError: The file of the tokenizer is missing or damaged.
    """
    # All other types of tokenizers ignore `--vocab-size`.
    if original_args.tokenizer_type == WITHOUT_TEXT and original_args.vocab_size:
        return original_args.vocab_size
    if args.tokenizer_type in TOKENIZER_TYPES:
        return load_tokenizer(args.tokenizer_type, args.tokenizer_model).vocab_size
    return args.padded_vocab_size
