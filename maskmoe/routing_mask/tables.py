"""Make the tables of routing masks: from visible sets, and of all layers from those of each layer."""

from collections.abc import Sequence

import numpy as np

from maskmoe.routing_mask.mask import pack_sets, row_dtype


def stack_tables(tables: Sequence[tuple[np.ndarray, np.ndarray]], num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Stack tables with different numbers of rows; tables with fewer rows get rows of all experts, which no id uses.

    Args:
        tables: Each table's `row_of_id`, integer `[vocab]`, and `visible_bits`, uint8 `[rows, bytes]`.
        num_experts: N, the number of experts in a layer.

    Returns:
        `row_of_id` `[tables, vocab]` and `visible_bits` `[tables, rows, bytes]`, see `RoutingMask`.
    """
    num_rows = max(len(bits) for _, bits in tables)
    row_of_id = np.stack([rows for rows, _ in tables]).astype(row_dtype(num_rows), copy=False)
    visible_bits = np.tile(pack_sets(np.ones(num_experts, bool)), (len(tables), num_rows, 1))
    for stacked, (_, bits) in zip(visible_bits, tables, strict=True):
        stacked[: len(bits)] = bits
    return row_of_id, visible_bits


def table_of_sets(visible: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `row_of_id` `[vocab]` and `visible_bits` `[rows, bytes]` of visible sets, bool `[vocab, N]`.

    Rows 0 to N - 1 are the single experts; each different set of several experts gets one row after them.
    """
    num_experts = visible.shape[1]
    is_single = visible.sum(axis=1) == 1
    sets, index = np.unique(pack_sets(visible[~is_single]), axis=0, return_inverse=True)
    row_of_id = np.empty(len(visible), np.int64)
    row_of_id[is_single] = visible[is_single].argmax(axis=1)
    row_of_id[~is_single] = num_experts + index.ravel()
    return row_of_id, np.concatenate([pack_sets(np.eye(num_experts, dtype=bool)), sets])
