"""The routing mask: the experts that each token id may use in each layer, fixed before training.

A run reads the mask by `checkpoint.read_routing_mask`; `transformer.visible_experts` holds the mask on the device.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import Field

from maskmoe.data.tokenizer_record import TokenizerRecord
from maskmoe.errors import UserError, counted
from maskmoe.routing_mask.feed_forward_layers import FeedForwardLayers
from maskmoe.routing_mask.sealed_tensors import SealedTensors

_MOST_LAYERS = 10_000
# A record lacks these fields of the provenance if they have their defaults, as in the files of older versions.
_OPTIONAL_FIELDS = ("expert_table", "hash_layers", "widened_from", "topk")


class CountedDataset(TypedDict):
    """Identity and size of a dataset whose tokens were counted."""

    name: str
    num_tokens: Annotated[int, Field(ge=1)]
    idx_sha256: str
    bin_bytes: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class HashLayers:
    """The first layers of a model, in which a table alone chooses the candidates: every id sees the same number.

    Attributes:
        num_layers: Number of these layers, counted from the first transformer layer, with and without experts.
        assignment: How visible experts are chosen, see `MaskRecipe`.
    """

    num_layers: Annotated[int, Field(ge=1)]
    visible_experts: Annotated[int, Field(ge=1)]
    assignment: str


class Ancestor(TypedDict):
    """Identity and settings of a mask that was widened; see `widen_routing_mask`."""

    digest: str
    frequent_mass: Annotated[int | float, Field(ge=0, le=1)]
    frequent_visible_experts: Annotated[int, Field(ge=2)] | None
    seed: int
    counts_digest: str | None


@dataclass(frozen=True)
class MaskProvenance:
    """The settings and data that a routing mask was made from.

    Attributes:
        assignment: How visible experts were chosen, see `MaskRecipe`, or `expert-table` if they were copied.
        frequent_mass: P, the share of all occurrences that the frequent ids cover.
        frequent_visible_experts: V_f, the number of visible experts of a frequent id; None if no id is frequent.
        seed: Seed of the random streams; if the mask was widened, the seed of the last widening.
        expert_model_parallel_size: Number of expert-parallel ranks of a rank-local mask, else None.
        counts_digest: Digest of the `TokenFrequency`, or None if the mask was made without counts.
        expert_table: `name` and `sha256` of the `ExpertTable` that the visible sets were copied from, or None.
        hash_layers: The first layers, to which P, V_f and the assignment do not apply; None if they apply to all.
        widened_from: The masks that were widened to this mask, the first mask first.
        topk: k of the router for which the loads of the experts were balanced; 1 if the mask does not depend on it.
    """

    assignment: str
    frequent_mass: Annotated[int | float, Field(ge=0, le=1)]
    frequent_visible_experts: Annotated[int, Field(ge=2)] | None
    seed: int
    expert_model_parallel_size: Annotated[int, Field(ge=1)] | None = None
    shared_table: bool = False
    preset: str | None = None
    counts_digest: str | None = None
    datasets: tuple[CountedDataset, ...] = ()
    tokenizer: TokenizerRecord | None = None
    expert_table: dict[str, str] | None = None
    hash_layers: HashLayers | None = None
    widened_from: tuple[Ancestor, ...] = ()
    topk: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True, eq=False)
class RoutingMask(SealedTensors):
    """The visible experts of every token id in every layer.

    An id with one visible expert costs one small integer in each table. Only the few sets of several experts are stored
    as bits.

    Attributes:
        row_of_id: Each id's row of `visible_bits`, int16 (int32 if the rows do not fit) `[tables, vocab]`.
        visible_bits: The visible sets, uint8 `[tables, rows, ceil(N / 8)]`; expert e is bit e % 8 of byte e // 8. Row
            i < N is the set {i}. Rows from N on are sets of two or more experts.
        vocab_size: Number of ids of the tokenizer, without padding.
        num_experts: N, the number of experts in a layer.
        num_layers: Number of layers that the mask is for: the feed-forward layers of the model, or its MoE layers.
            There is one table for each, or one for all.

    Raises:
        UserError: The parts do not fit together, or an id sees no expert.
    """

    KIND = "routing mask"

    row_of_id: np.ndarray
    visible_bits: np.ndarray
    vocab_size: int
    num_experts: int
    num_layers: int
    provenance: MaskProvenance

    def __post_init__(self) -> None:
        for name in ("row_of_id", "visible_bits"):
            array = np.ascontiguousarray(getattr(self, name)).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if problem := self._find_problem():
            raise UserError(f"not a valid routing mask: {problem}")

    def _find_problem(self) -> str | None:
        """Return a description of the first inconsistency, or None if the mask is valid."""
        rows, bits, num_experts = self.row_of_id, self.visible_bits, self.num_experts
        if num_experts < 2 or self.vocab_size < 1 or not 1 <= self.num_layers <= _MOST_LAYERS:
            return f"{num_experts} experts, {self.vocab_size} ids, {self.num_layers} layers"
        if rows.dtype not in (np.int16, np.int32) or bits.dtype != np.uint8:
            return f"tables have the types {rows.dtype} and {bits.dtype}"
        if rows.shape not in ((1, self.vocab_size), (self.num_layers, self.vocab_size)):
            return f"{rows.shape} rows of ids for {self.num_layers} layers and {self.vocab_size} ids"
        num_rows = bits.shape[1] if bits.ndim == 3 else 0
        if bits.shape != (len(rows), num_rows, -(-num_experts // 8)) or num_rows < num_experts:
            return f"bits of shape {bits.shape} for {len(rows)} tables and {num_experts} experts"
        if rows.min() < 0 or rows.max() >= num_rows:
            return f"an id has a row outside 0 to {num_rows - 1}"
        if (bits[:, :num_experts] != pack_sets(np.eye(num_experts, dtype=bool))).any():
            return f"the first {num_experts} rows are not the single experts"
        if num_experts % 8 and (bits[..., -1] >> num_experts % 8).any():
            return f"a visible set has experts beyond the {num_experts}"
        smallest = self.row_sizes[:, num_experts:].min(initial=2)
        if smallest == 0:
            return "a visible set is empty"
        return "a visible set of one expert is stored as one of several" if smallest == 1 else None

    @cached_property
    def row_sizes(self) -> np.ndarray:
        """Number of experts in each row, int64 `[tables, rows]`."""
        return np.bitwise_count(self.visible_bits).sum(axis=-1, dtype=np.int64)

    @property
    def is_shared(self) -> bool:
        """Whether one table applies to all layers."""
        return len(self.row_of_id) == 1

    @property
    def nbytes(self) -> int:
        """Size in bytes in memory; the file on disk has a short header in addition."""
        return self.row_of_id.nbytes + self.visible_bits.nbytes

    @cached_property
    def min_visible(self) -> int:
        """The smallest number of experts that any id sees in any layer."""
        return min(int(self.num_visible_of_layer(table).min()) for table in range(len(self.row_of_id)))

    @cached_property
    def max_visible(self) -> int:
        """The largest number of experts that any id sees in any layer."""
        return max(int(self.num_visible_of_layer(table).max()) for table in range(len(self.row_of_id)))

    def num_visible_of_layer(self, layer: int) -> np.ndarray:
        """Return the number of experts that each id sees in a layer, int64 `[vocab]`; layers count from 0."""
        table = self._table(layer)
        return self.row_sizes[table, self.row_of_id[table]]

    def table_of_layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `row_of_id` `[vocab]` and `visible_bits` `[rows, bytes]` of a layer; layers count from 0."""
        table = self._table(layer)
        return self.row_of_id[table], self.visible_bits[table]

    def _table(self, layer: int) -> int:
        """Return the table of a layer; layers count from 0."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"the routing mask has layers 0 to {self.num_layers - 1}, but no layer {layer}")
        return 0 if self.is_shared else layer

    def visible_to_any_id(self, table: int) -> np.ndarray:
        """Return whether each expert is visible to any id in a table, bool `[N]`."""
        return unpack_bits(self.visible_bits[table, np.unique(self.row_of_id[table])], self.num_experts).any(axis=0)

    def visible_sets(self, layer: int) -> np.ndarray:
        """Return the visible sets of a layer, bool `[vocab, N]`, which takes `vocab × N` bytes; layers count from 0."""
        row_of_id, visible_bits = self.table_of_layer(layer)
        return unpack_bits(visible_bits, self.num_experts)[row_of_id]

    def check_fits(
        self,
        *,
        vocab_size: int,
        num_experts: int,
        layers: FeedForwardLayers,
        expert_model_parallel_size: int | None = None,
    ) -> None:
        """Raise `UserError` if a model cannot use this mask.

        A mask has a table for each feed-forward layer, or for each MoE layer only. A mask with `shared_table`, or in
        which every id sees every expert, fits any number of layers. `vocab_size` is without padding. An
        `expert_model_parallel_size` of None skips the check of the ranks.
        """
        sizes = {
            "vocabulary size": (self.vocab_size, vocab_size),
            "number of experts": (self.num_experts, num_experts),
        }
        differences = [
            f"its {name} is {own}, the model's is {needed}; " for name, (own, needed) in sizes.items() if own != needed
        ]
        # A mask for one layer also has one table, but was not made for several layers.
        fits_any_layers = self.is_shared and (self.provenance.shared_table or self.min_visible == self.num_experts)
        if not (fits_any_layers or self.num_layers in (layers.num_moe_layers, len(layers.has_experts))):
            differences.append(f"it is for {counted(self.num_layers, 'MoE layer')}, the model has {layers}; ")
        if differences:
            raise UserError(
                f"routing mask does not fit: {''.join(differences)}build a routing mask for this model or change the "
                "model"
            )
        if expert_model_parallel_size is None:
            return
        built_for = self.provenance.expert_model_parallel_size
        # Fewer ranks hold whole groups of the original ranks' experts if their number divides the original number.
        if built_for is not None and built_for % expert_model_parallel_size:
            raise UserError(
                f"routing mask does not fit: it is rank-local for expert parallel size {built_for}, the run's is "
                f"{expert_model_parallel_size}; run with --expert-model-parallel-size {built_for} or a divisor of it, "
                "or build another mask"
            )

    def is_rank_local(self, num_ranks: int) -> bool:
        """Return whether each id sees experts of one rank only; each rank has an equal, contiguous block of experts."""
        # One table after the other, because the unpacked bits of all tables can take gigabytes.
        for row_of_id, visible_bits in zip(self.row_of_id, self.visible_bits, strict=True):
            visible = unpack_bits(visible_bits, self.num_experts)  # [rows, experts]
            num_ranks_of_row = visible.reshape(len(visible), num_ranks, -1).any(axis=-1).sum(axis=-1)
            # Check the rows through the ids, because some tables have rows that no id uses.
            if (num_ranks_of_row[row_of_id] != 1).any():
                return False
        return True

    def first_visible(self) -> np.ndarray:
        """Return the first visible expert of each row, int16 `[tables, rows]`."""
        first = [unpack_bits(visible_bits, self.num_experts).argmax(axis=-1) for visible_bits in self.visible_bits]
        return np.stack(first).astype(np.int16)

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the tables and the record, without the optional fields of the provenance that have their defaults."""
        tables, record = super().parts()
        for name in _OPTIONAL_FIELDS:
            if getattr(self.provenance, name) == getattr(MaskProvenance, name):
                del record["provenance"][name]
        return tables, record


def pack_sets(sets: np.ndarray) -> np.ndarray:
    """Pack sets of experts, bool `[…, N]`, into bits, uint8 `[…, bytes]`; expert e is bit e % 8 of byte e // 8."""
    return np.packbits(sets, axis=-1, bitorder="little")


def unpack_bits(visible_bits: np.ndarray, num_experts: int) -> np.ndarray:
    """Unpack visible bits `[…, bytes]` into bool `[…, num_experts]`."""
    return np.unpackbits(visible_bits, axis=-1, count=num_experts, bitorder="little").view(bool)


def row_dtype(num_rows: int) -> type[np.int16] | type[np.int32]:
    """Return the smallest dtype of a routing mask that can hold row numbers from 0 to `num_rows - 1`."""
    return np.int16 if num_rows <= np.iinfo(np.int16).max + 1 else np.int32


def mean_experts_per_token(mask: RoutingMask | None, topk: int, layers: FeedForwardLayers) -> float:
    """Return the mean number of experts that tokens use, min(k, V) for a token with V visible experts.

    The mean is over the tokens of the counted datasets. It assumes that the frequent ids have exactly the share of
    occurrences that they were chosen to cover. The true share differs by less than the share of one id.

    Args:
        mask: The routing mask; None if there is none, so that every token uses `topk` experts.
        topk: k.
        layers: The feed-forward layers of the model; layers of the decoder that the mask lacks are left out.
    """
    if mask is None:
        return topk
    num_tables = len(mask.row_of_id)
    numbers = [number for number, has_experts in enumerate(layers.decoder, start=1) if has_experts]
    tables = sorted({table for number in numbers if (table := layers.table(number, num_tables)) < num_tables})
    return float(np.mean([_mean_use_in_table(mask, topk, table) for table in tables])) if tables else topk


def _mean_use_in_table(mask: RoutingMask, topk: int, table: int) -> float:
    """Return the mean of min(k, V) over the tokens in one table."""
    num_visible = mask.num_visible_of_layer(table)
    used, is_frequent = np.minimum(num_visible, topk), num_visible > 1
    if is_frequent.all() or not is_frequent.any():
        return float(used.mean())
    share = mask.provenance.frequent_mass
    return share * float(used[is_frequent].mean()) + (1 - share) * float(used[~is_frequent].mean())


def describe_visible_experts(mask: RoutingMask) -> str:
    """Say how many experts the ids see, in one clause for each run of successive layers with equal numbers."""
    texts = [_describe(mask.num_visible_of_layer(table), mask.num_experts) for table in range(len(mask.row_of_id))]
    *groups, (last, _) = [(text, len(list(layers))) for text, layers in groupby(texts)]
    clauses = [
        f"in the {'next' if number else 'first'} {f'{size} layers' if size > 1 else 'layer'}, {text}; "
        for number, (text, size) in enumerate(groups)
    ]
    return "".join(clauses) + ("after that, " if groups else "") + last


def _describe(num_visible: np.ndarray, num_experts: int) -> str:
    """Say how many experts the ids of one table see; `num_visible` is `[vocab]`."""
    several = num_visible[num_visible > 1] if num_visible.max() > 1 else num_visible
    fewest, most = several.min(), several.max()
    experts = f"{fewest} to {most} of {num_experts} experts" if fewest < most else f"{most} of {num_experts} experts"
    if fewest == num_experts:
        experts = f"all {num_experts} experts"
    if len(several) == len(num_visible):
        return f"every id sees {experts}"
    verb = "sees" if len(several) == 1 else "see"
    return f"{len(several):,} of {len(num_visible):,} ids {verb} {experts}; every other id sees 1 expert"
