"""Turn tables of the experts of every token id, as models with hash layers have them, into routing masks."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from maskmoe.errors import UserError
from maskmoe.files.untrusted import UnusableFile, check_regular
from maskmoe.routing_mask.assignment import stack_tables, table_of_sets
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask

ASSIGNMENT = "expert-table"
_LAYER = "{layer}"


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
    def read(cls, location: str, num_layers: int) -> "ExpertTable":
        """Read a table from a file.

        Args:
            location: `F.npy`, `F.safetensors` with a single tensor, `F.safetensors:TENSOR`, or `FOLDER:TENSOR` for a
                tensor in any safetensors file of a folder. The tensor has the shape `[vocab, k]` or
                `[layers, vocab, k]`. If its name contains `{layer}`, there is one tensor `[vocab, k]` for each layer,
                as in DeepSeek-V4 (`model.layers.{layer}.mlp.gate.tid2eid`); layers without a tensor have no table.
            num_layers: Number of layers of the model.

        Raises:
            UserError: The file or the tensor is missing or damaged, or is not a table of experts.
        """
        path, separator, tensor = location.partition(":")
        names = [tensor.replace(_LAYER, str(layer)) for layer in range(num_layers)] if _LAYER in tensor else [tensor]
        found = _read_tensors(Path(path), names if tensor else None)
        if tensor and not found:
            others = ", and none of any other layer" if _LAYER in tensor else ""
            raise UserError(f"expert table {path} has no tensor {names[0]}{others}")
        name = Path(path).name + separator + tensor
        if _LAYER in tensor:
            return cls(name, [found.get(of_layer) for of_layer in names])
        if len(found) != 1:
            raise UserError(f"expert table {path} has {len(found)} tensors; name one after a colon")
        (table,) = found.values()
        # A tensor of three dimensions has a table for each layer.
        if table.ndim == 3 and len(table) not in (1, num_layers):
            raise UserError(f"expert table {location} is for {len(table)} layers, but the model has {num_layers}")
        return cls(name, list(table) if table.ndim == 3 else [table])

    @staticmethod
    def path_of(location: str) -> str:
        """Return the file or folder of a location, see `read`."""
        return location.partition(":")[0]

    @property
    def num_ids_with_repeats(self) -> int:
        """Number of ids that name an expert more than once in at least one layer."""
        repeats = [(np.diff(np.sort(table, axis=1), axis=1) == 0).any(axis=1) for table in self.tables]
        return int(np.logical_or.reduce(repeats).sum())

    def to_mask(self, num_experts: int, num_layers: int) -> RoutingMask:
        """Return the mask in which every id sees the experts that the table names.

        An id sees V = k experts, or fewer if the table repeats an expert.

        Args:
            num_experts: N, the number of experts in a layer.
            num_layers: Number of layers of the model.

        Raises:
            UserError: The table names an expert that does not exist.
        """
        for table in self.tables:
            outside = np.argwhere((table < 0) | (table >= num_experts))
            if len(outside):
                token_id, column = outside[0]
                raise UserError(
                    f"expert table {self.name} gives id {token_id} the expert {table[token_id, column]}, but the "
                    f"experts are 0 to {num_experts - 1}"
                )
        vocab_size, most = len(self.tables[0]), max(table.shape[1] for table in self.tables)
        digest, tables = hashlib.sha256(), []
        for experts in self.experts:
            digest.update(b"-" if experts is None else np.ascontiguousarray(experts, dtype="<i8").tobytes())
            # Without a table, every id sees all experts.
            visible = np.full((vocab_size, num_experts), experts is None)
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
        return RoutingMask(*stack_tables(tables, num_experts), vocab_size, num_experts, num_layers, provenance)


def _read_tensors(path: Path, names: Sequence[str] | None) -> dict[str, np.ndarray]:
    """Return the array of a .npy file, or the named tensors, all if None, of a safetensors file or a folder of them."""
    found: dict[str, np.ndarray] = {}
    for file in sorted(path.glob("*.safetensors")) if os.path.isdir(path) else [path]:
        try:
            check_regular(file)
            if file.suffix == ".npy":
                return {"": np.load(file, mmap_mode="r", allow_pickle=False)}
            with safe_open(file, framework="numpy") as tensors:
                wanted = set(tensors.keys()).intersection(names or tensors.keys())
                found |= {name: tensors.get_tensor(name) for name in wanted}
        except UnusableFile as error:
            raise UserError(f"expert table {error}") from error
        except OSError as error:
            raise UserError(f"cannot read expert table {file}: {error.strerror or error}") from error
        except (EOFError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"expert table {file} is not a readable file of integers: {error}") from error
    return found
