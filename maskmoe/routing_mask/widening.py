"""Widens a routing mask: some ids see more experts than before, and every id keeps the experts that it sees."""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from maskmoe.data.parallel import map_in_processes
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import LOAD_JITTER, MaskRecipe, Vocabulary, stack_tables, table_of_sets
from maskmoe.routing_mask.expert_table import ASSIGNMENT as EXPERT_TABLE
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import FEW_ASSIGNMENTS, Ancestor, RoutingMask, unpack_bits


def widen_routing_mask(
    mask: RoutingMask,
    *,
    frequency: TokenFrequency | None = None,
    frequent_mass: float | None = None,
    frequent_visible_experts: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = False,
) -> RoutingMask:
    """Return a mask in which frequent ids see more experts; every visible set contains the id's set in `mask`.

    An id is frequent in a layer if it sees several experts there, or if it is among the ids that cover the frequent
    mass by `frequency`. A frequent id with fewer than `frequent_visible_experts` experts gets further experts up to
    this number, by the mask's own assignment: uniform draws, or the least-loaded experts, on the id's rank if the mask
    is rank-local. All other ids, and hash layers, stay as they are. A mask from an expert table is widened by load if
    counts are given, else by uniform draws.

    Args:
        mask: The routing mask.
        frequency: Token counts. May be None if the mask is uniform and `frequent_mass` does not grow.
        frequent_mass: P, at least that of `mask`, which is the default.
        frequent_visible_experts: V_f, at least that of `mask`, which is the default.
        seed: Seed of the random choices.
        workers: Number of processes, as in `build_routing_mask`.
        progress: Whether to show a progress bar on stderr if the work takes more than half a second.

    Returns:
        The wider mask, whose provenance records `mask`; `mask` itself if no visible set grows.

    Raises:
        UserError: The settings would narrow the mask, do not fit it, or depend on counts that are not given.
    """
    recipe = _widened_recipe(mask, frequency, frequent_mass, frequent_visible_experts, seed)
    made_from = mask.provenance
    occurrences = np.zeros(mask.vocab_size) if frequency is None else frequency.occurrences
    num_tables = len(mask.row_of_id)
    num_hashed = made_from.hash_layers.num_layers if made_from.hash_layers else 0
    old_tables = [_Table(number, mask.row_of_id[number], mask.visible_bits[number]) for number in range(num_tables)]
    if workers is None and num_tables * mask.vocab_size < FEW_ASSIGNMENTS:
        workers = 1
    widen = partial(_widen_table, recipe, Vocabulary(occurrences, recipe))
    new_tables = map_in_processes(widen, old_tables[num_hashed:], workers)
    with tqdm(
        new_tables, total=num_tables - num_hashed, unit="table", desc="widening", delay=0.5, disable=not progress
    ) as bar:
        tables = [*old_tables[:num_hashed], *bar]
    if all(new is None for new in tables[num_hashed:]):
        return mask
    tables = [new or old for old, new in zip(old_tables, tables, strict=True)]
    row_of_id, visible_bits = stack_tables(
        [table.row_of_id for table in tables], [table.visible_bits for table in tables], mask.num_experts
    )
    ancestor: Ancestor = {
        "digest": mask.digest,
        "frequent_mass": made_from.frequent_mass,
        "frequent_visible_experts": made_from.frequent_visible_experts,
        "seed": made_from.seed,
        "counts_digest": made_from.counts_digest,
    }
    provenance = replace(
        made_from,
        frequent_mass=recipe.frequent_mass,
        frequent_visible_experts=recipe.frequent_visible_experts,
        seed=seed,
        preset=recipe.preset,
        widened_from=(*made_from.widened_from, ancestor),
    )
    if frequency is not None:
        counted = {"datasets": frequency.datasets, "tokenizer": frequency.tokenizer or made_from.tokenizer}
        provenance = replace(provenance, counts_digest=frequency.digest, **counted)
    return replace(mask, row_of_id=row_of_id, visible_bits=visible_bits, provenance=provenance)


class _Table(NamedTuple):
    """One table of a mask: its number, and its part of `row_of_id` `[vocab]` and of `visible_bits` `[rows, bytes]`."""

    number: int
    row_of_id: np.ndarray
    visible_bits: np.ndarray


def _widened_recipe(
    mask: RoutingMask,
    frequency: TokenFrequency | None,
    frequent_mass: float | None,
    frequent_visible_experts: int | None,
    seed: int,
) -> MaskRecipe:
    """Return the settings of the wider mask outside hash layers; see `widen_routing_mask` for arguments and errors."""
    made_from = mask.provenance
    old = {"frequent mass": made_from.frequent_mass, "frequent visible experts": made_from.frequent_visible_experts}
    new = dict(zip(old, (frequent_mass, frequent_visible_experts), strict=True))
    if all(value is None for value in new.values()):
        raise UserError("give a larger --frequent-mass or larger --frequent-visible-experts than the mask has")
    for name, value in new.items():
        if value is not None and value < (old[name] or 0):
            raise UserError(f"{name} {value} would narrow the mask, which has {old[name]}; a mask can only be widened")
    assignment = made_from.assignment
    if assignment == EXPERT_TABLE:
        assignment = "uniform" if frequency is None else "balanced"
    recipe = MaskRecipe(
        mask.num_experts,
        mask.num_layers,
        assignment,
        made_from.frequent_mass if frequent_mass is None else frequent_mass,
        frequent_visible_experts or made_from.frequent_visible_experts,
        seed,
        made_from.expert_model_parallel_size,
        # The presets without frequent ids describe the mask no longer.
        preset=made_from.preset if made_from.frequent_mass > 0 else None,
    )
    if frequency is None:
        if assignment != "uniform" or recipe.frequent_mass > made_from.frequent_mass:
            raise UserError("this depends on the frequency of each id; give --token-frequency")
        return recipe
    if frequency.vocab_size != mask.vocab_size:
        raise UserError(f"the counts are for {frequency.vocab_size} ids, the mask is for {mask.vocab_size}")
    tokenizers = {record.sha256 for record in (frequency.tokenizer, made_from.tokenizer) if record is not None}
    if len(tokenizers) > 1:
        raise UserError(f"the counts were made with {frequency.tokenizer}, the mask with {made_from.tokenizer}")
    return recipe


def _widen_table(recipe: MaskRecipe, vocabulary: Vocabulary, table: _Table) -> _Table | None:
    """Return the widened table, or None if no visible set grows.

    The random stream depends on the seed and the table's number only, and differs from that of `assign_table`.
    """
    rng = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=(table.number, 1)))
    sets = unpack_bits(table.visible_bits, recipe.num_experts)  # [rows, experts]
    sizes = sets.sum(axis=1)[table.row_of_id]  # [vocab]
    # Find the ids that get more experts, and sort them by descending occurrences.
    target = recipe.frequent_visible_experts or 1
    is_frequent = sizes > 1
    is_frequent[vocabulary.ids[: vocabulary.num_frequent]] = True
    grows = is_frequent & (sizes < target)
    sorted_grows = grows[vocabulary.ids]
    ids, occurrences = vocabulary.ids[sorted_grows], vocabulary.occurrences[sorted_grows]
    if not len(ids):
        return None
    # List the experts that each of these ids may get.
    visible = sets[table.row_of_id]  # [vocab, experts]
    ranks = visible[ids].reshape(len(ids), recipe.num_ranks, -1).any(axis=2)
    experts_per_rank = recipe.num_experts // recipe.num_ranks
    available = np.repeat(ranks, experts_per_rank, axis=1) & ~visible[ids]
    num_new = target - sizes[ids]
    # Add experts: by load for ids that occur, at random for all others.
    num_by_load = 0 if recipe.assignment == "uniform" else np.count_nonzero(occurrences)
    added = _draw(rng, available, num_new)
    if num_by_load:
        shares = np.empty(len(grows))
        shares[vocabulary.ids] = vocabulary.occurrences
        shares /= np.where(grows, target, sizes)
        loads = np.bincount(table.row_of_id, weights=shares, minlength=len(sets)) @ sets  # of the experts seen before
        by_load = slice(num_by_load)
        added[by_load] = _add_least_loaded(rng, loads, shares[ids[by_load]], available[by_load], num_new[by_load])
    visible[ids] |= added
    return _Table(table.number, *table_of_sets(visible))


def _draw(rng: np.random.Generator, available: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Draw `numbers` `[ids]` of the `available` experts of each id, every subset equally likely; bool `[ids, N]`."""
    keys = np.where(available, rng.random(available.shape, dtype=np.float32), np.inf)
    order = keys.argsort(axis=1)
    drawn = np.zeros_like(available)
    np.put_along_axis(drawn, order, np.arange(available.shape[1]) < numbers[:, None], axis=1)
    return drawn


def _add_least_loaded(
    rng: np.random.Generator, loads: np.ndarray, shares: np.ndarray, available: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    """Choose the least-loaded of the available experts for one id after the other; see `_spread` for the jitter.

    Args:
        rng: Source of randomness.
        loads: Load of each expert before, `[experts]`; is changed.
        shares: The load that each id adds to each of its experts, `[ids]`.
        available: The experts that each id may get, bool `[ids, experts]`.
        numbers: The number of experts that each id gets, `[ids]`.

    Returns:
        The chosen experts, bool `[ids, experts]`.
    """
    chosen = np.zeros_like(available)
    for row, (share, candidates, number) in enumerate(zip(shares, available, numbers, strict=True)):
        priorities = np.where(candidates, loads + LOAD_JITTER * share * rng.random(len(loads)), np.inf)
        experts = np.argpartition(priorities, number - 1)[:number]
        chosen[row, experts] = True
        loads[experts] += share
    return chosen
