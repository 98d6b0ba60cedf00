"""Find out whether the visible experts of every id lie on one expert-parallel rank, and on which rank."""

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


def rank_of_rows(mask: RoutingMask, num_ranks: int) -> np.ndarray | None:
    """Return the rank that holds the visible experts of each row of `visible_bits`, if the mask is rank-local.

    The result depends on the visible sets only, not on the assignment that chose them: a mask with one visible expert
    for every id is always rank-local.

    Args:
        mask: The routing mask.
        num_ranks: Number of ranks. Each holds an equal, contiguous block of experts.

    Returns:
        Rank of each row, int16 `[tables, rows]`; None if any id sees experts of two ranks in a layer.
    """
    visible = unpack_bits(mask.visible_bits, mask.num_experts)  # [tables, rows, experts]
    sees_rank = visible.reshape(*visible.shape[:2], num_ranks, -1).any(axis=-1)  # [tables, rows, ranks]
    # Check the rows through the ids, because some tables have rows that no id uses.
    num_ranks_of_id = np.take_along_axis(sees_rank.sum(axis=-1), mask.row_of_id.astype(np.int64), axis=1)
    return sees_rank.argmax(axis=-1).astype(np.int16) if (num_ranks_of_id == 1).all() else None
