"""Tables that name the experts of every token id, as models with hash layers carry them, as routing masks."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import MaskProvenance, RoutingMask

ASSIGNMENT = "expert-table"
_LAYER = "{layer}"


@dataclass(frozen=True)
class ExpertTable:
    """The experts of every id, layer by layer.

    Attributes:
        name: of file and tensor.
        experts: integers `[vocab, k]` of each layer; None for a layer in which every id sees all experts. One table
            serves all layers.

    Raises:
        UserError: the layers are of different vocabularies.
    """

    name: str
    experts: tuple[np.ndarray | None, ...]

    def __post_init__(self) -> None:
        sizes = sorted({len(table) for table in self._tables()})
        if len(sizes) != 1:
            raise UserError(f"expert table {self.name} must have one vocabulary, it has layers of {sizes} ids")

    @classmethod
    def read(cls, described: str, num_layers: int) -> "ExpertTable":
        """Read a table.

        Args:
            described: `F.npy`, `F.safetensors` with one tensor, `F.safetensors:TENSOR`, or `FOLDER:TENSOR` for all
                safetensors files of a folder. The tensor is `[vocab, k]` or `[layers, vocab, k]`; one `[vocab, k]` for
                each layer if its name has `{layer}`, as in DeepSeek-V4 (`model.layers.{layer}.mlp.gate.tid2eid`).
            num_layers: of the model.

        Raises:
            UserError: the file or the tensor is missing, damaged, or no such table.
        """
        path, separator, tensor = described.partition(":")
        name = Path(path).name + separator + tensor
        if Path(path).suffix == ".npy":
            arrays = [_read_npy(Path(path))]
        elif _LAYER in tensor:
            names = [tensor.replace(_LAYER, str(layer)) for layer in range(num_layers)]
            found = _read_safetensors(Path(path), set(names))
            if not found:
                raise UserError(f"expert table {described}: there is no tensor {names[0]} nor of any other layer")
            return cls(name, tuple(_checked(found[name], name) if name in found else None for name in names))
        else:
            found = _read_safetensors(Path(path), {tensor} if tensor else None)
            if len(found) != 1:
                what = f"no tensor {tensor}" if tensor else f"{len(found)} tensors; name one after a colon"
                raise UserError(f"expert table {path} has {what}")
            arrays = list(found.values())
        (array,) = arrays
        if array.ndim != 3:
            return cls(name, (_checked(array, described),))
        if len(array) not in (1, num_layers):
            raise UserError(f"expert table {described} is for {len(array)} layers, the model has {num_layers}")
        return cls(name, tuple(_checked(layer, described) for layer in array))

    @property
    def num_ids_with_repeats(self) -> int:
        """Ids that in some layer name an expert more than once."""
        repeats = [(np.diff(np.sort(table, axis=1), axis=1) == 0).any(axis=1) for table in self._tables()]
        return int(np.logical_or.reduce(repeats).sum())

    def to_mask(self, num_experts: int, num_layers: int) -> RoutingMask:
        """The mask under which an id sees the experts that the table names: V = k, or fewer if it repeats one.

        Raises:
            UserError: an expert does not exist.
        """
        for table in self._tables():
            outside = np.argwhere((table < 0) | (table >= num_experts))
            if len(outside):
                token_id, column = outside[0]
                raise UserError(
                    f"expert table {self.name} gives id {token_id} the expert {table[token_id, column]}, there are "
                    f"{num_experts}, counted from 0"
                )
        vocab_size = len(next(self._tables()))
        rows = [_rows_of_ids(table, vocab_size, num_experts) for table in self.experts]
        num_rows = max(len(sets) for _, sets in rows)
        dtype = np.int16 if num_rows <= np.iinfo(np.int16).max + 1 else np.int32
        all_experts = np.packbits(np.ones((1, num_experts), bool), axis=1, bitorder="little")
        return RoutingMask(
            row_of_id=np.stack([row_of_id for row_of_id, _ in rows]).astype(dtype),
            # Tables of fewer sets are filled up with one that no id has.
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
    """`row_of_id` `[vocab]` and `visible_bits` `[rows, bytes]` of a layer, see `RoutingMask`."""
    singles = np.eye(num_experts, dtype=bool)
    if table is None:
        sets = np.concatenate([singles, np.ones((1, num_experts), bool)])
        return np.full(vocab_size, num_experts), np.packbits(sets, axis=1, bitorder="little")
    visible = np.zeros((vocab_size, num_experts), bool)
    visible[np.arange(vocab_size)[:, None], table] = True
    is_single = visible.sum(axis=1) == 1
    bits = np.packbits(visible, axis=1, bitorder="little")
    sets, index = np.unique(bits[~is_single], axis=0, return_inverse=True)
    row_of_id = np.empty(vocab_size, np.int64)
    row_of_id[is_single] = visible[is_single].argmax(axis=1)
    row_of_id[~is_single] = num_experts + index.ravel()
    return row_of_id, np.concatenate([np.packbits(singles, axis=1, bitorder="little"), sets])


def _checked(table: np.ndarray, name: str) -> np.ndarray:
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
    """The tensors of these names in a file, or in all files of a folder; of all names if None."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    found = {}
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
