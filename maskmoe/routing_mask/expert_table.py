"""Tables of the experts of every token id, as models with hash layers have them: files, and conversion to masks."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from maskmoe.errors import UserError, counted
from maskmoe.files.outputs import atomic_output
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask
from maskmoe.routing_mask.sealed_tensors import reading_tensors
from maskmoe.routing_mask.tables import stack_tables, table_of_sets

ASSIGNMENT = "expert-table"
TENSOR_NAMES = {
    "tid2eid": "decoder.layers.{layer}.mlp.router.tid2eid",
    "tid2eid-deepseek": "layers.{layer}.ffn.gate.tid2eid",
}
"""The names of the layers' tables in Megatron-Core's models and in DeepSeek-V4's checkpoints, by format."""
_LAYER = "{layer}"
_MEGATRONS_LAYERS = "decoder.layers."
_MLP, _MOE, _STAGE, _PREDICTION = "-", "E", "|", "/"  # in a pattern
# transformers renames DeepSeek-V4's tensors to `model.layers.0.mlp.gate.tid2eid`.
_KNOWN_NAME = re.compile(
    r"(?:decoder\.layers\.(\d+)\.mlp\.router|(?:model\.)?layers\.(\d+)\.(?:ffn|mlp)\.gate)\.tid2eid"
)
_ADVICE = "make the mask with --preset top-k-hash or --hash-layers"


def layer_of_tensor(name: str) -> int | None:
    """Return the layer, from 0, whose table has this name in Megatron-Core, DeepSeek-V4 or transformers, or None."""
    match = _KNOWN_NAME.fullmatch(name)
    return int(match[1] or match[2]) if match else None


def split_location(location: str) -> tuple[Path, str]:
    """Return the path and the tensor of `PATH[:TENSOR]`: the longest path that exists, as both may have colons."""
    ends = [*(match.start() for match in re.finditer(":", location)), len(location)]
    end = next((end for end in reversed(ends) if os.path.exists(location[:end])), ends[0])
    return Path(location[:end]), location[end + 1 :]


def positions_of_layers(
    pattern: str | None, num_layers: int, names: Iterable[str] = (_MEGATRONS_LAYERS,)
) -> Sequence[int | None]:
    """Return the number, from 0, that each layer of a mask has among the decoder layers of its model.

    Args:
        pattern: `--hybrid-layer-pattern` of a `HybridModel`; None for a `GPTModel`, whose layers have one number each.
        num_layers: Number of layers of the mask, which are the model's MoE layers or all its feed-forward layers,
            multi-token prediction included.
        names: Names of tensors that contain the numbers. Megatron-Core's names count all layers of the pattern; all
            other names count feed-forward layers, one for each transformer layer.

    Returns:
        The numbers, which the names contain; None for a layer that is no hash layer: a feed-forward layer without
        experts, or a layer of multi-token prediction.

    Raises:
        UserError: The pattern has another number of layers.
    """
    if pattern is None:
        return range(num_layers)
    decoder, _, predictions = pattern.replace(_STAGE, "").partition(_PREDICTION)
    of_predictions = [symbol for symbol in predictions if symbol in (_MLP, _MOE)]
    if not any(_MEGATRONS_LAYERS in name for name in names):
        decoder = "".join(symbol for symbol in decoder if symbol in (_MLP, _MOE))
    feed_forward = [(layer, symbol) for layer, symbol in enumerate(decoder) if symbol in (_MLP, _MOE)]
    feed_forward += [(None, symbol) for symbol in of_predictions]
    moe = [layer for layer, symbol in feed_forward if symbol == _MOE]
    if num_layers == len(moe):
        return moe
    if num_layers == len(feed_forward):
        return [layer if symbol == _MOE else None for layer, symbol in feed_forward]
    raise UserError(
        f"--hybrid-layer-pattern '{pattern}' has {len(moe)} E and {len(feed_forward) - len(moe)} -, but the mask is "
        f"for {counted(num_layers, 'layer')}"
    )


@dataclass(frozen=True)
class ExpertTable:
    """The experts of every token id in each layer.

    Attributes:
        name: Name of the file and the tensor.
        experts: For each layer the experts of every id, integer `[vocab, k]`, or None if every id sees all experts in
            the layer. A single table applies to all layers.

    Raises:
        UserError: A table has another shape or dtype, or the tables have different vocabulary sizes.
    """

    name: str
    experts: Sequence[np.ndarray | None]

    def __post_init__(self) -> None:
        for table in self.tables:
            if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
                raise UserError(
                    f"expert table {self.name} must be integers [vocab, k] or [layers, vocab, k], not {table.dtype} "
                    f"{list(table.shape)}"
                )
        sizes = sorted({len(table) for table in self.tables})
        if len(sizes) != 1:
            raise UserError(f"expert table {self.name} must have one vocabulary, but it has layers of {sizes} ids")

    @property
    def tables(self) -> list[np.ndarray]:
        """The tables of the layers that have one."""
        return [table for table in self.experts if table is not None]

    @classmethod
    def read(cls, location: str, num_layers: int, pattern: str | None = None) -> Self:
        """Read a table from a file.

        Args:
            location: `F.npy`, or `F.safetensors` or a folder of such files, with or without `:TENSOR`. The tensor has
                the shape `[vocab, k]` or `[layers, vocab, k]`. Without TENSOR, the tables are the tensors
                `[vocab, k]` that `layer_of_tensor` knows, or the only tensor.
            num_layers: See `positions_of_layers`.
            pattern: See `positions_of_layers`.

        Raises:
            UserError: The file or the tensor is missing or damaged, or is not a table of experts for these layers.
        """
        path, tensor = split_location(location)
        name, file_of = f"{path.name}:{tensor}" if tensor else path.name, _files_of_tensors(path)
        known = [] if tensor else [each for each in file_of if layer_of_tensor(each) is not None]
        if known:
            tensors = {each: _read_tensor(file_of[each], each) for each in known}
            return cls.of_tensors(name, tensors, positions_of_layers(pattern, num_layers, known))
        return cls(name, _read_single_tensor(path, file_of, tensor, num_layers))

    @classmethod
    def of_tensors(cls, name: str, tensors: Mapping[str, np.ndarray], positions: Sequence[int | None]) -> Self:
        """Return the table of a model whose first layers with experts have tensors that `layer_of_tensor` knows.

        Args:
            name: Name of the file.
            tensors: The tables by the names of their tensors.
            positions: The number of each layer in the names of tensors; None for a layer without experts.

        Raises:
            UserError: A layer with experts lacks a table and a later layer has one, or see `ExpertTable`.
        """
        table_of = {layer: name for name in tensors if (layer := layer_of_tensor(name)) is not None}
        layers = [layer for layer in positions if layer is not None][: len(tensors)]
        if sorted(table_of) != layers:
            raise UserError(
                f"expert table {name} has tables of the layers {', '.join(map(str, sorted(table_of)))}, but the first "
                f"{counted(len(tensors), 'layer')} with experts must have them: {', '.join(map(str, layers))}; add "
                "missing files, or give --hybrid-layer-pattern for a HybridModel"
            )
        return cls(name, [tensors[table_of[layer]] if layer in table_of else None for layer in positions])

    @classmethod
    def of_mask(cls, mask: RoutingMask) -> Self:
        """Return the table of a mask in which every id sees k experts, int32, or all experts in some of the layers.

        Raises:
            UserError: Some ids see another number of experts, or all ids see all experts in all layers.
        """
        experts: list[np.ndarray | None] = []
        topk = 0
        for layer in range(len(mask.row_of_id)):
            num_visible = mask.num_visible_of_layer(layer)
            if num_visible.min() == mask.num_experts:
                experts.append(None)
                continue
            topk = topk or int(np.bincount(num_visible).argmax())
            others = np.flatnonzero(num_visible != topk)
            if len(others):
                raise UserError(
                    f"a tid2eid table has equally many experts for every id, but in table {layer} of the mask "
                    f"{len(others):,} of {mask.vocab_size:,} ids see another number than {topk}, such as id "
                    f"{others[0]}; {_ADVICE}"
                )
            experts.append(np.nonzero(mask.visible_sets(layer))[1].reshape(-1, topk).astype(np.int32))
        if not topk:
            raise UserError(
                f"every id sees all experts in all layers of the mask, so there is no tid2eid table to write; {_ADVICE}"
            )
        return cls(mask.digest, experts)

    def save(self, path: str | os.PathLike[str], tensor: str, positions: Sequence[int | None]) -> list[str]:
        """Write a safetensors file with a tensor for each layer that has a table, atomically.

        Args:
            path: The file to write.
            tensor: The names of the tensors, with `{layer}` for the number of a layer.
            positions: See `of_tensors`.

        Returns:
            The names of the tensors.

        Raises:
            UserError: The file cannot be written, or no layer with experts has a table.
        """
        experts = self.experts if len(self.experts) > 1 else [self.experts[0]] * len(positions)
        tensors = {
            tensor.replace(_LAYER, str(layer)): np.ascontiguousarray(table)
            for layer, table in zip(positions, experts, strict=True)
            if layer is not None and table is not None
        }
        if not tensors:
            raise UserError(
                "the hash layers of the mask have no experts in the model, so there is no table to write; check "
                "--hybrid-layer-pattern"
            )
        with atomic_output(path) as temporary:
            temporary.write_bytes(save(tensors, {"routing_mask": self.name}))
        return list(tensors)

    def to_mask(self, num_experts: int, num_layers: int, vocab_size: int | None = None) -> RoutingMask:
        """Return the mask in which every id sees the k experts that the table names.

        Args:
            num_experts: N, the number of experts in a layer.
            num_layers: Number of layers of the model.
            vocab_size: Number of ids of the tokenizer, at most that of the table, which may be padded; None for all
                ids of the table.

        Raises:
            UserError: The table names an expert that does not exist or the same expert twice, or has too few ids.
        """
        if vocab_size is not None and len(self.tables[0]) < vocab_size:
            raise UserError(
                f"expert table {self.name} has {len(self.tables[0]):,} ids, but the tokenizer has {vocab_size:,}"
            )
        all_experts = [None if table is None else table[:vocab_size] for table in self.experts]
        for table in (table for table in all_experts if table is not None):
            outside = np.argwhere((table < 0) | (table >= num_experts))
            if len(outside):
                token_id, column = outside[0]
                raise UserError(
                    f"expert table {self.name} gives id {token_id} the expert {table[token_id, column]}, but the "
                    f"experts are 0 to {num_experts - 1}"
                )
            repeated = np.flatnonzero((np.diff(np.sort(table, axis=1), axis=1) == 0).any(axis=1))
            if len(repeated):
                raise UserError(
                    f"expert table {self.name} gives {len(repeated):,} ids an expert twice, such as id {repeated[0]}: "
                    f"{', '.join(map(str, table[repeated[0]]))}; every expert of an id must be another one"
                )
        num_ids, most = len(self.tables[0][:vocab_size]), max(table.shape[1] for table in self.tables)
        digest, tables = hashlib.sha256(), []
        for experts in all_experts:
            digest.update(b"-" if experts is None else np.ascontiguousarray(experts, dtype="<i8").tobytes())
            # Without a table, every id sees all experts.
            visible = np.full((num_ids, num_experts), experts is None)
            if experts is not None:
                np.put_along_axis(visible, experts, True, axis=1)
            tables.append(table_of_sets(visible))
        provenance = MaskProvenance(
            assignment=ASSIGNMENT,
            frequent_mass=float(most > 1),
            frequent_visible_experts=most if most > 1 else None,
            seed=0,
            shared_table=len(tables) == 1,
            expert_table={"name": self.name, "sha256": digest.hexdigest()},
        )
        return RoutingMask(*stack_tables(tables, num_experts), num_ids, num_experts, num_layers, provenance)


def _files_of_tensors(path: Path) -> dict[str, Path]:
    """Return the file of each tensor of a safetensors file or of a folder of such files; a .npy file has one, ""."""
    file_of: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")) if os.path.isdir(path) else [path]:
        with reading_tensors(file, "expert table"):
            if file.suffix == ".npy":
                return {"": file}
            with safe_open(file, framework="numpy") as tensors:
                file_of |= dict.fromkeys(tensors.keys(), file)
    return file_of


def _read_single_tensor(path: Path, file_of: Mapping[str, Path], tensor: str, num_layers: int) -> list[np.ndarray]:
    """Read one tensor, the only one if `tensor` is empty; with three dimensions, it has a table for each layer.

    Raises:
        UserError: There is no such tensor, or it is for another number of layers.
    """
    if tensor and tensor not in file_of:
        raise UserError(f"expert table {path} has no tensor {tensor}")
    if not tensor and len(file_of) != 1:
        raise UserError(f"expert table {path} has {len(file_of)} tensors; name one after a colon")
    tensor = tensor or next(iter(file_of))
    table = _read_tensor(file_of[tensor], tensor)
    if table.ndim == 3 and len(table) not in (1, num_layers):
        raise UserError(f"expert table {path} is for {len(table)} layers, but the model has {num_layers}")
    return list(table) if table.ndim == 3 else [table]


def _read_tensor(file: Path, name: str) -> np.ndarray:
    """Return a tensor of a safetensors file, or the array of a .npy file."""
    with reading_tensors(file, "expert table"):
        if file.suffix == ".npy":
            return np.lib.format.open_memmap(file, mode="r")
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(name)
