"""Which experts each token id sees, layer by layer."""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from maskmoe.errors import UserError

ASSIGNMENTS = ("uniform", "balanced", "rank-local")
# The baselines, as the settings that make them. `smoe` also fixes V_f = N.
PRESETS = {
    "smoe": {"assignment": "uniform", "frequent_mass": 1.0},
    "hash": {"assignment": "uniform", "frequent_mass": 0.0, "frequent_visible_experts": None},
    "hash-balanced": {"assignment": "balanced", "frequent_mass": 0.0, "frequent_visible_experts": None},
    "top-k-hash": {"frequent_mass": 1.0},
}

# Randomness of the least-loaded choice, see `_spread`. On Zipf counts, ids that share an expert in one layer share one
# in the next about as rarely as by chance with 0.25, but in 30 to 100 % of the cases with 0; from 0.5 on, an expert can
# stay overloaded.
_LOAD_JITTER = 0.25


@dataclass(frozen=True)
class MaskRecipe:
    """Everything that decides a routing mask but the token counts.

    Attributes:
        num_experts: N, experts in a layer.
        num_layers: transformer layers of the model; each gets its own table unless `shared_table`.
        assignment: how visible experts are chosen.
            `uniform`: drawn uniformly without replacement, independently for every id.
            `balanced`: ids by descending count, each onto the least-loaded expert, or for V > 1 onto the V least-loaded
            ones, its occurrences spread evenly over them.
            `rank-local`: as `balanced`, but an id goes to the least-loaded expert-parallel rank first, and then to the
            least-loaded experts of that rank, so that all its visible experts are on one rank.
        frequent_mass: P, share of all occurrences that the frequent ids cover, in [0, 1].
        frequent_visible_experts: V_f, visible experts of a frequent id; None when no id is frequent.
        seed: of the random streams, one per table.
        expert_model_parallel_size: ranks the experts are spread over, contiguous blocks in order as in Megatron; set
            for `rank-local` only, the one assignment that depends on it.
        shared_table: one table for all layers.
        preset: name of the baseline that this recipe is, if it is one; see `from_preset`.

    Raises:
        UserError: the settings contradict each other.
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

    def __post_init__(self) -> None:
        if self.num_experts < 2 or self.num_layers < 1:
            raise UserError(f"need at least 2 experts and 1 layer, not {self.num_experts} and {self.num_layers}")
        if self.seed < 0:
            raise UserError(f"the seed must not be negative, it is {self.seed}")
        if self.assignment not in ASSIGNMENTS:
            raise UserError(f"unknown assignment {self.assignment!r}; choose one of {', '.join(ASSIGNMENTS)}")
        if not 0 <= self.frequent_mass <= 1:
            raise UserError(f"frequent mass is a share of occurrences between 0 and 1, not {self.frequent_mass}")
        if self.expert_model_parallel_size is not None and self.expert_model_parallel_size < 1:
            raise UserError(f"expert parallel size must be at least 1, not {self.expert_model_parallel_size}")
        if (self.assignment == "rank-local") != (self.expert_model_parallel_size is not None):
            raise UserError("an expert-parallel size is needed for rank-local assignment, and for no other")
        if self.num_experts % self.num_ranks:
            raise UserError(
                f"{self.num_experts} experts cannot be divided evenly over {self.num_ranks} expert-parallel ranks"
            )
        if self.frequent_mass > 0 or self.frequent_visible_experts is not None:
            self._check_visible_experts()

    @classmethod
    def from_preset(cls, preset: str, num_experts: int, num_layers: int, **settings: Any) -> "MaskRecipe":
        """The recipe of a baseline.

        `smoe`: every id sees all experts. `hash`: one, drawn uniformly. `hash-balanced`: one, by load. `top-k-hash`:
        every id sees `frequent_visible_experts`, drawn uniformly unless `assignment` is given.

        Args:
            settings: further fields of the recipe.

        Raises:
            UserError: the preset is unknown, or fixes one of `settings` otherwise.
        """
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        fixed = dict(PRESETS[preset])
        if preset == "smoe":
            fixed["frequent_visible_experts"] = num_experts
        if clashing := sorted(fixed.keys() & settings.keys()):
            raise UserError(f"preset {preset} already decides {', '.join(clashing).replace('_', ' ')}; leave it out")
        return cls(num_experts, num_layers, preset=preset, **({"assignment": "uniform"} | settings | fixed))

    def _check_visible_experts(self) -> None:
        visible = self.frequent_visible_experts
        if visible is None:
            raise UserError("the number of visible experts of frequent ids is missing")
        if not 2 <= visible <= self.num_experts:
            raise UserError(
                f"frequent ids can see 2 to {self.num_experts} of {self.num_experts} experts, not {visible}"
            )
        if visible > self.num_experts // self.num_ranks:
            raise UserError(
                f"frequent ids cannot see {visible} experts of one rank: {self.num_experts} experts on "
                f"{self.num_ranks} expert-parallel ranks are {self.num_experts // self.num_ranks} on each"
            )

    @property
    def all_frequent(self) -> bool:
        """Every id is frequent, even those never seen, whatever the counts."""
        return self.preset in ("smoe", "top-k-hash")

    @property
    def num_ranks(self) -> int:
        """Groups of experts that a visible set must not straddle."""
        return self.expert_model_parallel_size or 1

    @property
    def frequent_see_all(self) -> bool:
        """Frequent ids see every expert (V_f = N), so they all have the same visible set."""
        return self.frequent_visible_experts == self.num_experts

    @property
    def needs_counts(self) -> bool:
        """Without token counts this mask cannot be made."""
        return self.assignment != "uniform" or (self.frequent_mass > 0 and not self.all_frequent)

    @property
    def num_tables(self) -> int:
        """Tables to make: one for each layer, or one where all are the same."""
        identical = self.all_frequent and self.frequent_see_all
        return 1 if self.shared_table or identical else self.num_layers


def ids_by_frequency(occurrences: np.ndarray) -> np.ndarray:
    """Ids by descending `occurrences` `[vocab]`, ties by ascending id; int64 `[vocab]`."""
    return np.argsort(-occurrences, kind="stable")


def count_frequent(sorted_occurrences: np.ndarray, mass: float) -> int:
    """Length of the shortest prefix of `sorted_occurrences` (descending) that covers a share `mass` of their sum.

    Ids that never occur are not in it: `mass` = 1 covers exactly those that do.
    """
    if mass == 1:
        return int(np.count_nonzero(sorted_occurrences))
    covered = np.cumsum(sorted_occurrences)
    # The tolerance keeps a share that is met exactly (7 of 100 at mass 0.07) from being missed by rounding.
    target = mass * covered[-1] * (1 - 1e-12)
    return int(np.searchsorted(covered, target)) + 1 if target > 0 else 0


@dataclass(frozen=True)
class Vocabulary:
    """The ids as an assignment sees them: by rank of frequency.

    Attributes:
        ids: int64 `[vocab]`, by descending occurrences.
        occurrences: float64 `[vocab]`, of each of `ids`.
        num_frequent: how many of `ids`, from the first, are frequent.
    """

    ids: np.ndarray
    occurrences: np.ndarray
    num_frequent: int

    @classmethod
    def from_occurrences(cls, occurrences: np.ndarray, recipe: MaskRecipe) -> "Vocabulary":
        """Sort the ids of `occurrences` `[vocab]` and separate the frequent ones."""
        ids = ids_by_frequency(occurrences)
        sorted_occurrences = occurrences[ids]
        if recipe.all_frequent:
            return cls(ids, sorted_occurrences, len(ids))
        return cls(ids, sorted_occurrences, count_frequent(sorted_occurrences, recipe.frequent_mass))

    @property
    def frequent_share(self) -> float:
        """Share of all occurrences that are of frequent ids; 0 where nothing was counted."""
        total = self.occurrences.sum()
        return float(self.occurrences[: self.num_frequent].sum() / total) if total else 0.0


def assign_table(recipe: MaskRecipe, vocabulary: Vocabulary, table: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose the visible experts of every id in one table.

    The random stream depends on `recipe.seed` and `table` only: the same arguments give the same bits.

    Returns:
        row_of_id: int16 (int32 where it does not fit) `[vocab]`, each id's row of `visible_bits`.
        visible_bits: uint8 `[rows, ceil(N / 8)]`, expert e at bit e % 8 of byte e // 8. Rows 0 to N - 1 are the single
            experts, the others the frequent ids' sets (one for all when they see every expert).
    """
    rng = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=(table,)))
    num_experts, num_frequent = recipe.num_experts, vocabulary.num_frequent
    # Ids that see all experts add the same load to each, and nothing is left to choose.
    num_sets = 0 if recipe.frequent_see_all else num_frequent
    skipped = num_frequent - num_sets
    if recipe.assignment == "uniform":
        sets = uniform_subsets(rng, num_sets, recipe.frequent_visible_experts or 0, num_experts)
        single_expert = rng.integers(num_experts, size=len(vocabulary.ids) - num_frequent)
    else:
        sets, single_expert = _assign_by_load(rng, vocabulary.occurrences[skipped:], num_sets, recipe)
    if skipped:
        sets = np.ones((1, num_experts), dtype=bool)

    num_rows = num_experts + len(sets)
    row_of_id = np.empty(len(vocabulary.ids), dtype=np.int16 if num_rows <= np.iinfo(np.int16).max + 1 else np.int32)
    row_of_id[vocabulary.ids[:num_frequent]] = num_experts if skipped else np.arange(num_experts, num_rows)
    row_of_id[vocabulary.ids[num_frequent:]] = single_expert
    visible = np.concatenate([np.eye(num_experts, dtype=bool), sets])
    return row_of_id, np.packbits(visible, axis=1, bitorder="little")


def uniform_subsets(rng: np.random.Generator, count: int, size: int, num_experts: int) -> np.ndarray:
    """Draw `count` sets of `size` experts, every set equally likely; bool `[count, num_experts]`.

    Floyd's algorithm (Bentley and Floyd, "A sample of brilliance", CACM 1987) on all sets at once.
    """
    chosen = np.zeros((count, num_experts), dtype=bool)
    each_set = np.arange(count)
    for last in range(num_experts - size, num_experts):
        drawn = rng.integers(last + 1, size=count)
        chosen[each_set, np.where(chosen[each_set, drawn], last, drawn)] = True
    return chosen


def _assign_by_load(
    rng: np.random.Generator, occurrences: np.ndarray, num_sets: int, recipe: MaskRecipe
) -> tuple[np.ndarray, np.ndarray]:
    """Balanced assignment, over the ranks first where there are several; see `_spread` for arguments and results."""
    if recipe.num_ranks == 1:
        return _spread(rng, occurrences, num_sets, recipe.frequent_visible_experts, recipe.num_experts)
    _, rank_of_position = _spread(rng, occurrences, 0, None, recipe.num_ranks)
    experts_per_rank = recipe.num_experts // recipe.num_ranks
    sets = np.zeros((num_sets, recipe.num_ranks, experts_per_rank), dtype=bool)
    single_expert = np.empty(len(occurrences), dtype=np.int64)
    for rank in range(recipe.num_ranks):
        members = np.flatnonzero(rank_of_position == rank)
        with_set, with_single = members[members < num_sets], members[members >= num_sets]
        sets[with_set, rank], local_expert = _spread(
            rng, occurrences[members], len(with_set), recipe.frequent_visible_experts, experts_per_rank
        )
        single_expert[with_single] = rank * experts_per_rank + local_expert
    return sets.reshape(num_sets, recipe.num_experts), single_expert[num_sets:]


def _spread(
    rng: np.random.Generator, occurrences: np.ndarray, num_sets: int, set_size: int | None, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Put each item on the least-loaded of `num_bins` bins; the first `num_sets` on the `set_size` least-loaded ones.

    Exact least-loaded placement has nothing random but ties: it would give every table nearly the same partition of the
    ids with the experts renamed, and ids that collide in one layer would collide in all. So what decides is a bin's
    load plus a random part, at most `_LOAD_JITTER`, of the item it was given last. The bin chosen exceeds the least
    load by no more than that part of the last item of the least-loaded bin, and the many small items that follow level
    it.

    Items that never occur weigh nothing; they are dealt out evenly at random.

    Args:
        occurrences: float64 `[items]`, descending.

    Returns:
        sets: bool `[num_sets, num_bins]`.
        bin_of_item: int64 `[items - num_sets]`, of the items after the first `num_sets`.
    """
    num_seen = int(np.count_nonzero(occurrences))
    num_seen_sets = min(num_sets, num_seen)
    smallest = occurrences[num_seen - 1] if num_seen else 0.0
    loads = np.zeros(num_bins)
    priorities = smallest * rng.random(num_bins)

    sets = np.zeros((num_sets, num_bins), dtype=bool)
    if num_seen_sets:
        shares = occurrences[:num_seen_sets] / set_size
        jitters = _LOAD_JITTER * shares * rng.random(num_seen_sets)
        for item, (share, jitter) in enumerate(zip(shares, jitters, strict=True)):
            bins = np.argpartition(priorities, set_size - 1)[:set_size]
            sets[item, bins] = True
            loads[bins] += share
            priorities[bins] = loads[bins] + jitter
    sets[num_seen_sets:] = uniform_subsets(rng, num_sets - num_seen_sets, set_size or 0, num_bins)

    singles = occurrences[num_sets:num_seen]
    heap = list(zip(priorities.tolist(), loads.tolist(), range(num_bins), strict=True))
    heapq.heapify(heap)
    jitters = _LOAD_JITTER * singles * rng.random(len(singles))
    bin_of_single = []
    for share, jitter in zip(singles.tolist(), jitters.tolist(), strict=True):
        _, load, least_loaded = heap[0]
        bin_of_single.append(least_loaded)
        heapq.heapreplace(heap, (load + share + jitter, load + share, least_loaded))

    num_unseen = len(occurrences) - max(num_sets, num_seen)
    dealt = rng.permutation(num_bins)[rng.permutation(num_unseen) % num_bins]
    return sets, np.concatenate([np.array(bin_of_single, dtype=np.int64), dealt])
