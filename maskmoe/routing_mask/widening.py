"""Widens a routing mask: some ids see more experts than before, and every id keeps the experts that it sees."""

from dataclasses import replace
from functools import partial

import numpy as np
from tqdm import tqdm

from maskmoe.data.parallel import map_in_processes
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import FEW_ASSIGNMENTS, LOAD_JITTER, MaskRecipe, Vocabulary
from maskmoe.routing_mask.expert_table import ASSIGNMENT as EXPERT_TABLE
from maskmoe.routing_mask.frequency import TokenFrequency, check_same_vocabulary
from maskmoe.routing_mask.mask import Ancestor, MaskProvenance, RoutingMask, stack_tables, table_of_sets, unpack_bits


def widen_routing_mask(
    mask: RoutingMask,
    *,
    frequency: TokenFrequency | None = None,
    frequent_mass: float | None = None,
    frequent_visible_experts: int | None = None,
    seed: int = 0,
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
        progress: Whether to show a progress bar on stderr if the work takes more than half a second.

    Returns:
        The wider mask, whose provenance records `mask`; `mask` itself if no visible set grows.

    Raises:
        UserError: The settings would narrow the mask, do not fit it, or depend on counts that are not given.
    """
    recipe = _widened_recipe(mask, frequency, frequent_mass, frequent_visible_experts, seed)
    made_from = mask.provenance
    vocabulary = Vocabulary(np.zeros(mask.vocab_size) if frequency is None else frequency.occurrences, recipe)
    num_tables = len(mask.row_of_id)
    workers = 1 if num_tables * mask.vocab_size < FEW_ASSIGNMENTS else None
    # Hash layers keep their tables.
    first = made_from.hash_layers.num_layers if made_from.hash_layers else 0
    old_tables = [mask.table_of_layer(table) for table in range(num_tables)]
    widen_table = partial(_widen_table, recipe, vocabulary, len(made_from.widened_from))
    new_tables = map_in_processes(widen_table, list(enumerate(old_tables))[first:], workers)
    bar = tqdm(new_tables, total=num_tables - first, unit="table", desc="widening", delay=0.5, disable=not progress)
    tables = [*old_tables[:first], *(new or old for old, new in zip(old_tables[first:], bar, strict=True))]
    if all(new is old for old, new in zip(old_tables, tables, strict=True)):
        return mask
    row_of_id, visible_bits = stack_tables(tables, mask.num_experts)
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


def widened_numbers(
    made_from: MaskRecipe | MaskProvenance, frequent_mass: float | None, frequent_visible_experts: int | None
) -> tuple[float, int | None]:
    """Return the frequent mass and the visible experts of frequent ids of the wider mask; None keeps those of the mask.

    Raises:
        UserError: Both are None, or one would narrow the mask.
    """
    if frequent_mass is None and frequent_visible_experts is None:
        raise UserError("give a larger --frequent-mass or larger --frequent-visible-experts than the mask has")
    mass = made_from.frequent_mass if frequent_mass is None else frequent_mass
    visible = frequent_visible_experts or made_from.frequent_visible_experts
    if mass < made_from.frequent_mass or (visible or 0) < (made_from.frequent_visible_experts or 0):
        raise UserError(
            f"frequent mass {mass} and frequent visible experts {visible} would narrow the mask, which has "
            f"{made_from.frequent_mass} and {made_from.frequent_visible_experts}; a mask can only be widened"
        )
    return mass, visible


def _widened_recipe(
    mask: RoutingMask,
    frequency: TokenFrequency | None,
    frequent_mass: float | None,
    frequent_visible_experts: int | None,
    seed: int,
) -> MaskRecipe:
    """Return the settings of the wider mask outside hash layers; see `widen_routing_mask` for arguments and errors."""
    made_from = mask.provenance
    mass, visible = widened_numbers(made_from, frequent_mass, frequent_visible_experts)
    assignment = made_from.assignment
    if assignment == EXPERT_TABLE:
        assignment = "uniform" if frequency is None else "balanced"
    recipe = MaskRecipe(
        mask.num_experts,
        mask.num_layers,
        assignment,
        mass,
        visible,
        seed,
        made_from.expert_model_parallel_size,
        # The presets without frequent ids describe the mask no longer.
        preset=made_from.preset if made_from.frequent_mass > 0 else None,
        topk=made_from.topk,
    )
    if frequency is None:
        if assignment != "uniform" or recipe.frequent_mass > made_from.frequent_mass:
            raise UserError("this depends on the frequency of each id; give --token-frequency")
        return recipe
    check_same_vocabulary(frequency, mask)
    return recipe


def _widen_table(
    recipe: MaskRecipe,
    vocabulary: Vocabulary,
    num_earlier: int,
    numbered: tuple[int, tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the widened table, or None if no visible set grows.

    Ids get experts one after the other, by descending occurrences: the least-loaded experts, with the jitter of
    `assignment._spread`. Ids without occurrences, and all ids if the recipe is uniform, draw their experts at random.
    The random stream depends on the seed, the table's number and `num_earlier` only, and differs from that of
    `assign_table`.

    Args:
        recipe: The settings of the wider mask.
        vocabulary: The ids by frequency.
        num_earlier: Number of earlier widenings of the mask. Each widening has a random stream of its own: otherwise
            two widenings with one seed would give the i-th ids of both nearly the same experts.
        numbered: The number of the table, and its `row_of_id` `[vocab]` and `visible_bits` `[rows, bytes]`.
    """
    number, (row_of_id, visible_bits) = numbered
    rng = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=(number, 1 + num_earlier)))
    sets = unpack_bits(visible_bits, recipe.num_experts)  # [rows, experts]
    visible, sizes = sets[row_of_id], sets.sum(axis=1)[row_of_id]  # [vocab, experts], [vocab]
    # Find the ids that get more experts.
    target = recipe.frequent_visible_experts or 1
    is_frequent = sizes > 1
    is_frequent[vocabulary.ids[: vocabulary.num_frequent]] = True
    grows = is_frequent & (sizes < target)
    if not grows.any():
        return None
    # The load that each id adds to each of its experts, and the load of the experts that are seen already.
    shares = np.zeros(len(sizes))
    if recipe.assignment != "uniform":
        shares[vocabulary.ids] = vocabulary.occurrences
        num_visible = np.where(grows, target, sizes)
        shares *= np.minimum(num_visible, recipe.topk)  # as `expected_expert_load`
        shares /= num_visible
    # Not a matrix product, whose rounding depends on the processor.
    rows, experts = np.nonzero(sets)
    share_of_row = np.bincount(row_of_id, weights=shares, minlength=len(sets))
    loads = np.bincount(experts, weights=share_of_row[rows], minlength=recipe.num_experts)
    experts_per_rank = recipe.num_experts // recipe.num_ranks
    growing = vocabulary.ids[grows[vocabulary.ids]]
    # The mean load that the later ids add, see `assignment._spread`.
    added_loads = shares[growing] * (target - sizes[growing])
    later = np.append(np.cumsum(added_loads[:0:-1])[::-1], 0.0) / recipe.num_experts
    for token_id, of_later in zip(growing, later, strict=True):
        seen, share, noise = visible[token_id], shares[token_id], rng.random(recipe.num_experts)
        # The id may get further experts of the ranks on which it sees experts.
        available = np.repeat(seen.reshape(recipe.num_ranks, -1).any(axis=1), experts_per_rank) & ~seen
        priorities = np.where(available, loads + LOAD_JITTER * (share + of_later) * noise if share else noise, np.inf)
        # Not argpartition, whose order of ties depends on the processor.
        added = np.argsort(priorities, kind="stable")[: target - sizes[token_id]]
        visible[token_id, added] = True
        loads[added] += share
    return table_of_sets(visible)
