"""Chooses home experts: for each frequent id, the visible expert that its occurrences prefer when training begins."""

from dataclasses import replace

import numpy as np

from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import LOAD_JITTER, ids_by_frequency, row_dtype, stack_tables
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


def with_home_experts(mask: RoutingMask, frequency: TokenFrequency) -> RoutingMask:
    """Return the mask with one home among the visible experts of each id and table; visible sets do not change.

    The only expert of an id with one visible expert is its home. All other ids are placed by descending count, each on
    the least-loaded of its visible experts, so the homes alone are a balanced table of one expert for each id. The
    random stream depends on the mask's seed and the number of the table only.

    Args:
        mask: The routing mask. A single table gets homes for each layer, unless the mask was made to share a table.
        frequency: Token counts.

    Raises:
        UserError: No id sees several experts, or the counts are for another vocabulary.
    """
    if mask.max_visible == 1:
        raise UserError("home experts are for ids that see several experts, but every id of the mask sees one")
    if frequency.vocab_size != mask.vocab_size:
        raise UserError(f"the counts are for {frequency.vocab_size} ids, the mask is for {mask.vocab_size}")
    num_tables = 1 if mask.provenance.shared_table else mask.num_layers
    tables = [_table_with_homes(mask, table, frequency.occurrences) for table in range(num_tables)]
    rows_of_ids, bits_of_tables, homes_of_tables = zip(*tables, strict=True)
    row_of_id, visible_bits = stack_tables(rows_of_ids, bits_of_tables, mask.num_experts)
    # No id uses the rows that fill up tables. They see all experts, so expert 0 can be their home.
    home_of_row = np.zeros(visible_bits.shape[:2], row_dtype(mask.num_experts))
    for stacked, homes in zip(home_of_row, homes_of_tables, strict=True):
        stacked[: len(homes)] = homes
    return replace(mask, row_of_id=row_of_id, visible_bits=visible_bits, home_of_row=home_of_row)


def home_of_ids(mask: RoutingMask, layer: int) -> np.ndarray:
    """Return the home expert of each id in a layer, integer `[vocab]`; layers count from 0.

    Raises:
        ValueError: The mask has no home experts.
    """
    if mask.home_of_row is None:
        raise ValueError("the routing mask has no home experts")
    row_of_id, _ = mask.table_of_layer(layer)
    return mask.home_of_row[0 if mask.is_shared else layer][row_of_id]


def load_of_homes(mask: RoutingMask, occurrences: np.ndarray) -> np.ndarray:
    """Return the load of each expert if every occurrence goes to its home expert, float64 `[tables, N]`.

    Args:
        mask: The routing mask.
        occurrences: Occurrences of each id, `[vocab]`.
    """
    homes = [home_of_ids(mask, table) for table in range(len(mask.row_of_id))]
    return np.stack([np.bincount(of_table, weights=occurrences, minlength=mask.num_experts) for of_table in homes])


def check_has_homes(mask: RoutingMask, flag: str) -> None:
    """Raise a UserError that names a flag if a mask has no home experts, which the flag needs."""
    if mask.home_of_row is None:
        raise UserError(f"{flag} needs a routing mask with home experts: build the mask with --home-experts")


def _table_with_homes(
    mask: RoutingMask, table: int, occurrences: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return `row_of_id` `[vocab]`, `visible_bits` `[rows, bytes]` and `home_of_row` `[rows]` of one table.

    Rows 0 to N - 1 are the single experts; each different pair of a visible set and a home gets one row after them.
    """
    num_experts = mask.num_experts
    row_of_id, visible_bits = mask.table_of_layer(table)
    is_frequent = row_of_id >= num_experts
    ids = ids_by_frequency(occurrences)
    ids = ids[is_frequent[ids]]
    rng = np.random.default_rng(np.random.SeedSequence(mask.provenance.seed, spawn_key=(table, 2)))
    loads = np.bincount(row_of_id[~is_frequent], weights=occurrences[~is_frequent], minlength=num_experts)
    visible = unpack_bits(visible_bits, num_experts)  # [rows, experts]
    homes = _least_loaded(rng, loads, occurrences[ids], visible, row_of_id[ids])
    pairs, index = np.unique(row_of_id[ids].astype(np.int64) * num_experts + homes, return_inverse=True)
    new_row_of_id = row_of_id.astype(np.int64)
    new_row_of_id[ids] = num_experts + index.ravel()
    new_bits = np.concatenate([visible_bits[:num_experts], visible_bits[pairs // num_experts]])
    return new_row_of_id, new_bits, np.concatenate([np.arange(num_experts), pairs % num_experts])


def _least_loaded(
    rng: np.random.Generator, loads: np.ndarray, weights: np.ndarray, visible: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Place one id after the other on the least-loaded of its visible experts; return the experts, int64 `[ids]`.

    A random part of the weight that an expert received last keeps the tables different, see `assignment._spread`. Ids
    without weight are placed at random.

    Args:
        rng: Source of randomness.
        loads: Load of each expert before, `[experts]`; is changed.
        weights: Weight of each id, descending, `[ids]`.
        visible: Sets of experts, bool `[rows, experts]`.
        rows: The visible set of each id, integer `[ids]`.
    """
    homes = np.empty(len(rows), np.int64)
    priorities = loads + weights.min(initial=np.inf, where=weights > 0) * rng.random(len(loads))
    for place, (weight, row) in enumerate(zip(weights, rows, strict=True)):
        wanted = priorities if weight else rng.random(len(loads))
        home = homes[place] = np.where(visible[row], wanted, np.inf).argmin()
        loads[home] += weight
        priorities[home] = loads[home] + LOAD_JITTER * weight * rng.random()
    return homes
