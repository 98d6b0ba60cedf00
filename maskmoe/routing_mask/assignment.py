"""Make routing masks: choose the experts that each token id sees, table by table."""

import heapq
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from maskmoe.data.parallel import map_in_processes
from maskmoe.errors import UserError
from maskmoe.routing_mask.frequency import TokenFrequency, count_frequent, ids_by_frequency
from maskmoe.routing_mask.mask import (
    HashLayers,
    MaskProvenance,
    RoutingMask,
    pack_sets,
    row_dtype,
)
from maskmoe.routing_mask.tables import stack_tables

ASSIGNMENTS = ("uniform", "balanced", "rank-local")
# Each baseline fixes these settings of a recipe. `smoe` also fixes V_f = N.
PRESETS: dict[str, dict[str, Any]] = {
    "smoe": {"assignment": "uniform", "frequent_mass": 1.0},
    "hash": {"assignment": "uniform", "frequent_mass": 0.0, "frequent_visible_experts": None},
    "hash-balanced": {"assignment": "balanced", "frequent_mass": 0.0, "frequent_visible_experts": None},
    "top-k-hash": {"frequent_mass": 1.0},
}

# Randomness of the least-loaded choice, see `_spread`. Measured on Zipf counts: with 0, ids that share an expert in one
# table share an expert in the next table in 30 to 100 % of the cases. With 0.5 this happens about as rarely as by
# chance. From 1 on, the items that follow may be too few to level the loads.
LOAD_JITTER = 0.5
# Items with at least this share of the mean load of a bin are placed one by one, the many smaller ones by a heap.
LARGE_SHARE = 1 / 256

# Fewer assignments than this take less time than starting worker processes.
FEW_ASSIGNMENTS = 1 << 20


@dataclass(frozen=True)
class MaskRecipe:
    """All settings of a routing mask except the token counts.

    Attributes:
        num_experts: N, the number of experts in a layer.
        num_layers: Transformer layers of the model. Each layer gets its own table unless `shared_table` is set.
        assignment: How visible experts are chosen.
            `uniform`: Every id draws its experts uniformly without replacement.
            `balanced`: Ids are placed by descending count. An id with V = 1 goes to the least-loaded expert. An id with
            V > 1 goes to the V least-loaded experts, and adds a load of min(k, V) / V of its occurrences to each.
            `rank-local`: An id goes to the least-loaded expert-parallel rank, and there to the least-loaded experts.
            All its visible experts are on one rank.
        frequent_mass: P, the share of all occurrences that the frequent ids cover, in [0, 1].
        frequent_visible_experts: V_f, the number of visible experts of a frequent id; None if no id is frequent.
        seed: Seed of the random streams, one stream for each table.
        expert_model_parallel_size: Number of expert-parallel ranks. Each rank holds a contiguous block of experts, in
            order, as in Megatron. Set for `rank-local` only, because no other assignment depends on it.
        shared_table: Whether all layers use one table.
        preset: Name of the baseline that this recipe describes, or None; see `from_preset`.
        hash_layers: The first layers, to which `assignment`, `frequent_mass`, `frequent_visible_experts` and `preset`
            do not apply; None if they apply to all layers.
        topk: k, the number of experts that a token uses if it sees so many.

    Raises:
        UserError: The settings contradict each other.
    """

    num_experts: int
    num_layers: int
    assignment: str
    frequent_mass: float
    frequent_visible_experts: int | None = None
    seed: int = 0
    expert_model_parallel_size: int | None = None
    shared_table: bool = False
    preset: str | None = None
    hash_layers: HashLayers | None = None
    topk: int = 1

    def __post_init__(self) -> None:
        if problem := self._find_problem() or self._find_problem_of_hash_layers():
            raise UserError(problem)

    def _find_problem(self) -> str | None:
        """Return a description of the first contradiction, or None if the settings are sound."""
        num_experts, num_ranks = self.num_experts, self.expert_model_parallel_size
        visible, experts_of_rank = self.frequent_visible_experts, num_experts // self.num_ranks
        if num_experts < 2:
            return f"need at least 2 experts, not {num_experts}"
        if self.assignment not in ASSIGNMENTS:
            return f"unknown assignment {self.assignment!r}; choose one of {', '.join(ASSIGNMENTS)}"
        if not 1 <= self.topk <= num_experts:
            return f"a token uses 1 to {num_experts} of {num_experts} experts, not {self.topk}"
        if not 0 <= self.frequent_mass <= 1:
            return f"frequent mass is a share of occurrences between 0 and 1, not {self.frequent_mass}"
        if (self.assignment == "rank-local") != (num_ranks is not None):
            return "an expert-parallel size is needed for rank-local assignment, and for no other"
        if num_experts % self.num_ranks:
            return f"{num_experts} experts cannot be divided evenly over {num_ranks} expert-parallel ranks"
        if visible is None:
            return "the number of visible experts of frequent ids is missing" if self.frequent_mass > 0 else None
        if not 2 <= visible <= num_experts:
            return f"frequent ids can see 2 to {num_experts} of {num_experts} experts, not {visible}"
        if visible > experts_of_rank:
            return f"frequent ids cannot see {visible} experts of one rank, which has {experts_of_rank}"
        return None

    def _find_problem_of_hash_layers(self) -> str | None:
        """Return a description of the first contradiction between `hash_layers` and the other settings, or None."""
        hashed = self.hash_layers
        if hashed is None:
            return None
        if not 1 <= hashed.num_layers < self.num_layers:
            return f"1 to {self.num_layers - 1} of {self.num_layers} layers can be hash layers, not {hashed.num_layers}"
        if self.shared_table:
            return "hash layers need tables of their own; do not share one table among all layers"
        try:
            self.of_table(0)
        except UserError as error:
            return f"hash layers: {error}"
        return None

    @classmethod
    def from_preset(cls, preset: str, num_experts: int, num_layers: int, **settings: Any) -> "MaskRecipe":
        """Return the recipe of a baseline.

        - `smoe`: Every id sees all experts.
        - `hash`: Every id sees one expert, drawn uniformly.
        - `hash-balanced`: Every id sees one expert, chosen by load.
        - `top-k-hash`: Every id sees `frequent_visible_experts` experts, drawn uniformly unless `assignment` is given.

        Args:
            preset: Name of the baseline.
            num_experts: Experts in a layer.
            num_layers: Transformer layers of the model.
            settings: Further fields of the recipe.

        Raises:
            UserError: The preset is unknown, or `settings` has a field that the preset fixes.
        """
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        fixed = PRESETS[preset].copy()
        if preset == "smoe":
            fixed["frequent_visible_experts"] = num_experts
        if clashing := sorted(fixed.keys() & settings.keys()):
            raise UserError(f"preset {preset} already decides {', '.join(clashing).replace('_', ' ')}; leave it out")
        all_settings: dict[str, Any] = {"assignment": "uniform"} | settings | fixed
        return cls(num_experts, num_layers, preset=preset, **all_settings)

    @property
    def all_frequent(self) -> bool:
        """Whether every id is frequent, whatever the counts, including ids that never occur."""
        return self.preset in ("smoe", "top-k-hash")

    @property
    def load_of_frequent(self) -> int:
        """The load that each occurrence of a frequent id adds to its experts together: min(k, V_f).

        The load is 1, as for other ids, if the placement of the ids does not depend on k.
        """
        visible = self.frequent_visible_experts
        is_weighed = visible is not None and 0 < self.frequent_mass < 1 and visible < self.num_experts
        return min(self.topk, visible) if is_weighed and self.assignment in ("balanced", "rank-local") else 1

    @property
    def num_ranks(self) -> int:
        """Number of ranks that a visible set must not cross; 1 if visible sets may hold any experts."""
        return self.expert_model_parallel_size or 1

    @property
    def frequent_see_all(self) -> bool:
        """Whether frequent ids see every expert (V_f = N), so that they all have the same visible set."""
        return self.frequent_visible_experts == self.num_experts

    @property
    def needs_counts(self) -> bool:
        """Whether the mask depends on token counts."""
        hashed_by_load = self.hash_layers is not None and self.hash_layers.assignment != "uniform"
        return hashed_by_load or self.assignment != "uniform" or (self.frequent_mass > 0 and not self.all_frequent)

    @property
    def num_tables(self) -> int:
        """Number of tables to make: one for each layer, or one if the tables of all layers are equal."""
        identical = self.all_frequent and self.frequent_see_all and self.hash_layers is None
        return 1 if self.shared_table or identical else self.num_layers

    def of_table(self, table: int) -> "MaskRecipe":
        """Return the recipe of one table, without hash layers; tables count from 0."""
        hashed = self.hash_layers
        if hashed is None or table >= hashed.num_layers:
            return replace(self, hash_layers=None)
        several = hashed.visible_experts > 1
        return replace(
            self,
            assignment=hashed.assignment,
            frequent_mass=float(several),
            frequent_visible_experts=hashed.visible_experts if several else None,
            preset="top-k-hash" if several else None,
            hash_layers=None,
        )


class Vocabulary:
    """The ids sorted by frequency, which is the order in which they are assigned.

    Args:
        occurrences: Occurrences of each id, float64 `[vocab]`.
        recipe: Says which ids are frequent.

    Attributes:
        ids: The ids by descending occurrences, int64 `[vocab]`.
        occurrences: Occurrences of each of `ids`, float64 `[vocab]`.
        num_frequent: Number of frequent ids; they are the first of `ids`.
    """

    def __init__(self, occurrences: np.ndarray, recipe: MaskRecipe) -> None:
        self.ids = ids_by_frequency(occurrences)
        self.occurrences = occurrences[self.ids]
        covering = count_frequent(self.occurrences, recipe.frequent_mass)
        self.num_frequent = len(self.ids) if recipe.all_frequent else covering


def build_routing_mask(
    recipe: MaskRecipe,
    *,
    frequency: TokenFrequency | None = None,
    vocab_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> RoutingMask:
    """Make the routing mask of a recipe.

    Args:
        recipe: The settings.
        frequency: Token counts. May be None if the recipe does not depend on counts.
        vocab_size: Number of ids of the tokenizer; used only if there are no counts.
        workers: Number of processes that make tables. None uses one process on each available core, or only the calling
            process if the mask is small. The mask does not depend on the number.
        progress: Whether to show a progress bar on stderr if the work takes more than half a second.

    Raises:
        UserError: The recipe depends on counts but `frequency` is None, or the vocabulary size is missing.
    """
    if frequency is not None:
        occurrences = frequency.occurrences
    elif recipe.needs_counts:
        raise UserError("this routing mask depends on the frequency of each id; give --token-frequency")
    elif vocab_size is None or vocab_size < 1:
        raise UserError("the vocabulary size is missing; give --token-frequency, or --vocab-size of at least 1")
    else:
        occurrences = np.zeros(vocab_size)
    if workers is None and recipe.num_tables * len(occurrences) < FEW_ASSIGNMENTS:
        workers = 1
    tables = map_in_processes(partial(assign_table, recipe, occurrences), range(recipe.num_tables), workers)
    bar = tqdm(tables, total=recipe.num_tables, unit="table", desc="assigning", delay=0.5, disable=not progress)
    row_of_id, visible_bits = stack_tables(list(bar), recipe.num_experts)
    settings: dict[str, Any] = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    sizes = {"vocab_size": len(occurrences)} | {name: settings.pop(name) for name in ("num_experts", "num_layers")}
    settings["topk"] = recipe.topk if recipe.load_of_frequent > 1 else 1
    if frequency is not None:
        settings["counts_digest"] = frequency.digest
        settings |= {"datasets": frequency.datasets, "tokenizer": frequency.tokenizer}
    return RoutingMask(row_of_id, visible_bits, **sizes, provenance=MaskProvenance(**settings))


def assign_table(recipe: MaskRecipe, occurrences: np.ndarray, table: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the visible experts of every id in one table.

    The random stream depends on `recipe.seed` and `table` only: the same arguments give the same bits.

    Args:
        recipe: The settings of the mask.
        occurrences: Occurrences of each id, float64 `[vocab]`.
        table: Index of the table, which selects the random stream.

    Returns:
        row_of_id: Each id's row of `visible_bits`, int16 (int32 if the rows do not fit) `[vocab]`.
        visible_bits: The visible sets, uint8 `[rows, ceil(N / 8)]`; expert e is bit e % 8 of byte e // 8. Rows 0 to
            N - 1 are the sets of one expert. The remaining rows are the sets of the frequent ids: one row for each id,
            or one row for all of them if they see every expert.
    """
    recipe = recipe.of_table(table)
    vocabulary = Vocabulary(occurrences, recipe)
    rng = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=(table,)))
    num_experts, num_frequent = recipe.num_experts, vocabulary.num_frequent
    # Ids that see all experts add the same load to each expert and need no choice, so they are skipped.
    num_sets = 0 if recipe.frequent_see_all else num_frequent
    skipped = num_frequent - num_sets
    # Choose the sets of the frequent ids, and the expert of every other id.
    if recipe.assignment == "uniform":
        sets = uniform_subsets(rng, num_sets, recipe.frequent_visible_experts or 0, num_experts)
        single_expert = rng.integers(num_experts, size=len(vocabulary.ids) - num_frequent)
    else:
        weights = vocabulary.occurrences[skipped:].copy()
        weights[:num_sets] *= recipe.load_of_frequent
        sets, single_expert = _assign_by_load(rng, weights, num_sets, recipe)
    if skipped:
        sets = np.ones((1, num_experts), dtype=bool)

    # Number the rows and pack the sets into bits.
    num_rows = num_experts + len(sets)
    row_of_id = np.empty(len(vocabulary.ids), dtype=row_dtype(num_rows))
    row_of_id[vocabulary.ids[:num_frequent]] = num_experts if skipped else np.arange(num_experts, num_rows)
    row_of_id[vocabulary.ids[num_frequent:]] = single_expert
    visible = np.concatenate([np.eye(num_experts, dtype=bool), sets])
    return row_of_id, pack_sets(visible)


def uniform_subsets(rng: np.random.Generator, count: int, size: int, num_experts: int) -> np.ndarray:
    """Draw `count` sets of `size` experts, every set equally likely; bool `[count, num_experts]`.

    This is Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987), run on all sets at once.
    """
    chosen = np.zeros((count, num_experts), dtype=bool)
    each_set = np.arange(count)
    for last in range(num_experts - size, num_experts):
        drawn = rng.integers(last + 1, size=count)
        chosen[each_set, np.where(chosen[each_set, drawn], last, drawn)] = True
    return chosen


def _assign_by_load(
    rng: np.random.Generator, weights: np.ndarray, num_sets: int, recipe: MaskRecipe
) -> tuple[np.ndarray, np.ndarray]:
    """Assign ids by load: to the ranks first if there are several, then to the experts.

    See `_spread` for the arguments and results.
    """
    num_ranks, set_size = recipe.num_ranks, recipe.frequent_visible_experts or 0
    rank_of_id = np.zeros(len(weights)) if num_ranks == 1 else _spread(rng, weights, 0, 0, num_ranks)[1]
    # On each rank, choose among the rank's experts for the ids that were placed there.
    experts_per_rank = recipe.num_experts // num_ranks
    sets = np.zeros((num_sets, num_ranks, experts_per_rank), dtype=bool)
    single_expert = np.empty(len(weights), dtype=np.int64)
    for rank in range(num_ranks):
        members = np.flatnonzero(rank_of_id == rank)
        with_set, with_single = members[members < num_sets], members[members >= num_sets]
        spread = _spread(rng, weights[members], len(with_set), set_size, experts_per_rank)
        sets[with_set, rank] = spread[0]
        single_expert[with_single] = rank * experts_per_rank + spread[1]
    return sets.reshape(num_sets, recipe.num_experts), single_expert[num_sets:]


def _spread(
    rng: np.random.Generator, weights: np.ndarray, num_sets: int, set_size: int, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put each item on the least-loaded of `num_bins` bins; the first `num_sets` on the `set_size` least-loaded ones.

    Exact least-loaded placement is random only in its ties. It would give every table nearly the same partition of the
    ids with the experts renamed, so ids that collide in one layer would collide in all layers. Therefore each bin's
    priority is its load plus a random part, at most `LOAD_JITTER`, of the item's share and of the load that all later
    items will add to a bin on average. So later items can level what the random part unbalances.

    Items that never occur weigh nothing and are dealt out evenly in a random order.

    Args:
        rng: Source of randomness.
        weights: Loads that the items add to all their bins together, descending, float64 `[items]`.
        num_sets: Number of items, from the first, that go to several bins.
        set_size: Number of bins for each of these items.
        num_bins: Number of bins.

    Returns:
        sets: Bins of the first `num_sets` items, bool `[num_sets, num_bins]`.
        bin_of_item: Bin of each item after the first `num_sets`, int64 `[items - num_sets]`.
    """
    num_seen = int(np.count_nonzero(weights))
    num_seen_sets = min(num_sets, num_seen)
    smallest = weights[num_seen - 1] if num_seen else 0.0
    loads = np.zeros(num_bins)
    later = np.append(np.cumsum(weights[:0:-1])[::-1], 0.0) / num_bins  # the mean load that later items add

    def choose(item: int, share: float, size: int) -> np.ndarray:
        """Add the share to `size` bins and return the bins."""
        priorities = loads + LOAD_JITTER * (share + later[item]) * rng.random(num_bins)
        # Not argpartition, whose order of ties depends on the processor.
        bins = np.argsort(priorities, kind="stable")[:size]
        loads[bins] += share
        return bins

    # Items of several bins: each bin gets an equal share of the item.
    sets = np.zeros((num_sets, num_bins), dtype=bool)
    for item, weight in enumerate(weights[:num_seen_sets]):
        sets[item, choose(item, weight / set_size, set_size)] = True
    sets[num_seen_sets:] = uniform_subsets(rng, num_sets - num_seen_sets, set_size, num_bins)

    # Large items of one bin.
    num_large = np.count_nonzero(weights >= LARGE_SHARE * (weights[:1] / num_bins + later[:1]))
    large, small = np.split(weights[num_sets:num_seen], [max(num_large - num_sets, 0)])
    bin_of_single = [choose(num_sets + item, share, 1)[0] for item, share in enumerate(large)]

    # Small items of one bin: a heap gives the bin of the lowest priority.
    heap = list(zip((loads + smallest * rng.random(num_bins)).tolist(), loads.tolist(), range(num_bins), strict=True))
    heapq.heapify(heap)
    jitters = LOAD_JITTER * small * rng.random(len(small))
    for share, jitter in zip(small.tolist(), jitters.tolist(), strict=True):
        _, load, least_loaded = heap[0]
        bin_of_single.append(least_loaded)
        heapq.heapreplace(heap, (load + share + jitter, load + share, least_loaded))

    # Items that never occur: all bins in turn, in a random order.
    num_unseen = len(weights) - max(num_sets, num_seen)
    dealt = rng.permutation(num_bins)[rng.permutation(num_unseen) % num_bins]
    return sets, np.concatenate([np.array(bin_of_single, dtype=np.int64), dealt])
