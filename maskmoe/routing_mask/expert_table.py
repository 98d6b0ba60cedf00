"""Turn tables of the experts of every token id, as models with hash layers have them, into routing masks."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import row_dtype
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
        UserError: The tables have different vocabulary sizes, or there is no table.
    """

    name: str
    experts: tuple[np.ndarray | None, ...]

    def __post_init__(self) -> None:
        sizes = sorted({len(table) for table in self._tables()})
        if len(sizes) != 1:
            raise UserError(f"expert table {self.name} must have one vocabulary, but it has layers of {sizes} ids")

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
        name = Path(path).name + separator + tensor
        if Path(path).suffix == ".npy":
            array = _read_npy(Path(path))
        elif _LAYER in tensor:
            names = [tensor.replace(_LAYER, str(layer)) for layer in range(num_layers)]
            found = _read_safetensors(Path(path), set(names))
            if not found:
                raise UserError(f"expert table {location}: it has no tensor {names[0]}, and none of any other layer")
            return cls(name, tuple(_checked(found[name], name) if name in found else None for name in names))
        else:
            found = _read_safetensors(Path(path), {tensor} if tensor else None)
            if len(found) != 1:
                problem = f"no tensor {tensor}" if tensor else f"{len(found)} tensors; name one after a colon"
                raise UserError(f"expert table {path} has {problem}")
            (array,) = found.values()
        # A tensor of three dimensions has a table for each layer.
        if array.ndim != 3:
            return cls(name, (_checked(array, location),))
        if len(array) not in (1, num_layers):
            raise UserError(f"expert table {location} is for {len(array)} layers, but the model has {num_layers}")
        return cls(name, tuple(_checked(layer, location) for layer in array))

    @property
    def num_ids_with_repeats(self) -> int:
        """Number of ids that name an expert more than once in at least one layer."""
        repeats = [(np.diff(np.sort(table, axis=1), axis=1) == 0).any(axis=1) for table in self._tables()]
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
        for table in self._tables():
            outside = np.argwhere((table < 0) | (table >= num_experts))
            if len(outside):
                token_id, column = outside[0]
                raise UserError(
                    f"expert table {self.name} gives id {token_id} the expert {table[token_id, column]}, but the "
                    f"experts are 0 to {num_experts - 1}"
                )
        vocab_size = len(next(self._tables()))
        rows = [_rows_of_ids(table, vocab_size, num_experts) for table in self.experts]
        num_rows = max(len(sets) for _, sets in rows)
        all_experts = np.packbits(np.ones((1, num_experts), bool), axis=1, bitorder="little")
        return RoutingMask(
            row_of_id=np.stack([row_of_id for row_of_id, _ in rows]).astype(row_dtype(num_rows)),
            # All layers need the same number of rows; add rows that no id uses.
            visible_bits=np.stack(
                [np.concatenate([sets, all_experts.repeat(num_rows - len(sets), axis=0)]) for _, sets in rows]
            ),
            vocab_size=vocab_size,
            num_experts=num_experts,
            num_layers=num_layers,
            provenance=self._provenance(),
        )

    def _tables(self) -> Iterator[np.ndarray]:
        return (table for table in self.experts if table is not None)

    def _provenance(self) -> MaskProvenance:
        digest = hashlib.sha256()
        for table in self.experts:
            digest.update(b"-" if table is None else np.ascontiguousarray(table, dtype="<i8").tobytes())
        most = max(table.shape[1] for table in self._tables())
        return MaskProvenance(
            assignment=ASSIGNMENT,
            frequent_mass=float(most > 1),
            frequent_visible_experts=most if most > 1 else None,
            seed=0,
            shared_table=len(self.experts) == 1,
            expert_table={"name": self.name, "sha256": digest.hexdigest()},
        )


def _rows_of_ids(table: np.ndarray | None, vocab_size: int, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `row_of_id` `[vocab]` and `visible_bits` `[rows, bytes]` of one layer, see `RoutingMask`."""
    singles = np.eye(num_experts, dtype=bool)
    if table is None:
        sets = np.concatenate([singles, np.ones((1, num_experts), bool)])
        return np.full(vocab_size, num_experts), np.packbits(sets, axis=1, bitorder="little")
    visible = np.zeros((vocab_size, num_experts), bool)
    visible[np.arange(vocab_size)[:, None], table] = True
    # Rows 0 to N - 1 are the single experts; each different set of several experts gets one row after them.
    is_single = visible.sum(axis=1) == 1
    bits = np.packbits(visible, axis=1, bitorder="little")
    sets, index = np.unique(bits[~is_single], axis=0, return_inverse=True)
    row_of_id = np.empty(vocab_size, np.int64)
    row_of_id[is_single] = visible[is_single].argmax(axis=1)
    row_of_id[~is_single] = num_experts + index.ravel()
    return row_of_id, np.concatenate([np.packbits(singles, axis=1, bitorder="little"), sets])


def _checked(table: np.ndarray, name: str) -> np.ndarray:
    """Return the table of one layer after checking its shape and dtype."""
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise UserError(
            f"expert table {name} must be integers [vocab, k] or [layers, vocab, k], not {table.dtype} "
            f"{list(table.shape)}"
        )
    return table


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"cannot read expert table {path}: {error.strerror or error}") from error
    except (EOFError, ValueError) as error:
        raise UserError(f"expert table {path} is not a readable .npy file of numbers") from error


def _read_safetensors(path: Path, names: set[str] | None) -> Mapping[str, np.ndarray]:
    """Return the tensors of the given names, or all tensors if None, of a file or of all files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found: dict[str, np.ndarray] = {}
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys() if names is None else names.intersection(tensors.keys()):
                    found[name] = tensors.get_tensor(name)
        except OSError as error:
            raise UserError(f"cannot read expert table {file}: {error.strerror or error}") from error
        except (SafetensorError, TypeError, ValueError) as error:
            raise UserError(f"expert table {file} is not a readable safetensors file of integers: {error}") from error
    return found
