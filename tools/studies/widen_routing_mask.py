r"""Widen a routing mask: let frequent ids see more experts, and keep every expert that an id sees.

Give a larger share P of frequent ids, a larger number V_f of experts that a frequent id sees, or both. The further
experts are chosen as the mask's were. A run that is under way continues with the wider mask if it is given
--change-routing-mask.

Example:
  %(prog)s --routing-mask mask.safetensors --token-frequency counts.safetensors \
    --frequent-visible-experts 16 --output wider.safetensors
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.command_line.build_routing_mask import describe_imbalance, read_mask, warn_of_overload
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.assignment import LOAD_JITTER, MaskRecipe, Vocabulary
from maskmoe.routing_mask.expert_table import ASSIGNMENT as EXPERT_TABLE
from maskmoe.routing_mask.frequency import TokenFrequency, check_same_vocabulary, expected_expert_load
from maskmoe.routing_mask.mask import Ancestor, RoutingMask, unpack_bits
from maskmoe.routing_mask.tables import stack_tables, table_of_sets


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
    # Hash layers keep their tables.
    first = made_from.hash_layers.num_layers if made_from.hash_layers else 0
    old_tables = [mask.table_of_layer(table) for table in range(len(mask.row_of_id))]
    bar = tqdm(old_tables[first:], unit="table", desc="widening", delay=0.5, disable=not progress)
    widen_table = partial(_widen_table, recipe, vocabulary, len(made_from.widened_from))
    tables = [*old_tables[:first], *(widen_table((first + number, old)) or old for number, old in enumerate(bar))]
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


def _widened_recipe(
    mask: RoutingMask,
    frequency: TokenFrequency | None,
    frequent_mass: float | None,
    frequent_visible_experts: int | None,
    seed: int,
) -> MaskRecipe:
    """Return the settings of the wider mask outside hash layers; see `widen_routing_mask` for arguments and errors."""
    made_from = mask.provenance
    if frequent_mass is None and frequent_visible_experts is None:
        raise UserError("give a larger --frequent-mass or larger --frequent-visible-experts than the mask has")
    mass = made_from.frequent_mass if frequent_mass is None else frequent_mass
    visible = frequent_visible_experts or made_from.frequent_visible_experts
    if mass < made_from.frequent_mass or (visible or 0) < (made_from.frequent_visible_experts or 0):
        raise UserError(
            f"frequent mass {mass} and frequent visible experts {visible} would narrow the mask, which has "
            f"{made_from.frequent_mass} and {made_from.frequent_visible_experts}; a mask can only be widened"
        )
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


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of the process."""
    parser = command_parser(__doc__)
    mask = "routing mask to widen: a file, a checkpoint, or the folder of a run's checkpoints"
    add_option(parser, "--routing-mask F", mask, Path, required=True)
    counts = "file of token counts; needed unless the mask is uniform and P does not grow"
    add_option(parser, "--token-frequency F", counts, Path)
    mass = "the most frequent ids that together make up this share (0 to 1) of all occurrences become frequent ids, in "
    mass += "addition to those that see several experts already (default: the mask's P)"
    add_option(parser, "--frequent-mass P", mass, ranges.SHARE)
    visible = "experts that each frequent id sees (default: the mask's V_f)"
    add_option(parser, "--frequent-visible-experts V_f", visible, ranges.EXPERTS)
    add_seed_argument(parser, "the random choices")
    add_option(parser, "--output F", "file to write, .safetensors", Path, required=True)
    add_force_argument(parser)
    return parser.parse_args(words)


def print_summary(old: RoutingMask, new: RoutingMask, frequency: TokenFrequency | None) -> None:
    """Print what changes from one mask to the other: sets, sizes of sets, and expected load."""
    num_pairs = old.vocab_size * old.num_layers
    print(f"changed sets     {count_changes(old, new):,} of {num_pairs:,} (id, layer) pairs")
    print(f"frequent ids     {_count_frequent(old):,} → {_count_frequent(new):,} of {new.vocab_size:,}")
    print(f"visible experts  {_mean_visible(old):.3f} → {_mean_visible(new):.3f} (mean over ids and layers), ", end="")
    print(f"{old.max_visible} → {new.max_visible} (largest)")
    if frequency is not None:
        topk = old.provenance.topk
        for name, mask in (("before", old), ("after", new)):
            load = expected_expert_load(mask, frequency.occurrences, topk)
            print(f"{'load ' + name:16} {describe_imbalance(load)} at top-{topk}")
            if num_ranks := mask.provenance.expert_model_parallel_size:
                print(f"{'  of ranks':16} {describe_imbalance(load, num_ranks)}")
        warn_of_overload(new, frequency.occurrences, topk)
    print(f"digest before    {old.digest}")
    print(f"digest           {new.digest}")


def count_changes(old: RoutingMask, new: RoutingMask) -> int:
    """Return the number of pairs of an id and a layer whose visible sets differ between two masks of equal sizes."""
    num_changed = sum(
        int((old.visible_bits[table, rows] != new.visible_bits[table, new.row_of_id[table]]).any(axis=1).sum())
        for table, rows in enumerate(old.row_of_id)
    )
    return num_changed * (old.num_layers // len(old.row_of_id))


def _count_frequent(mask: RoutingMask) -> int:
    return int(np.count_nonzero(mask.num_visible_of_layer(mask.num_layers - 1) > 1))


def _mean_visible(mask: RoutingMask) -> float:
    return float(np.mean([mask.num_visible_of_layer(table).mean() for table in range(len(mask.row_of_id))]))


def main() -> None:
    """Widen the mask, write the wider mask and print what changed."""
    arguments = parse_arguments()
    inputs = [path for path in (arguments.routing_mask, arguments.token_frequency) if path]
    check_outputs([arguments.output], inputs, arguments.force)
    mask = read_mask(arguments.routing_mask)
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    with atomic_output(arguments.output) as temporary:
        wider = widen_routing_mask(
            mask,
            frequency=frequency,
            frequent_mass=arguments.frequent_mass,
            frequent_visible_experts=arguments.frequent_visible_experts,
            seed=arguments.seed,
            progress=True,
        )
        wider.save(temporary)
    print_summary(mask, wider, frequency)
    print(f"written          {arguments.output}")


if __name__ == "__main__":
    run_tool(main)
