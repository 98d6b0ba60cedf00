"""Whether the visible experts of every id are on one rank, and on which."""

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


def rank_of_rows(mask: RoutingMask, num_ranks: int) -> np.ndarray | None:
    """The rank of the visible experts of each row of a mask's `visible_bits`, if the mask is rank-local.

    It goes by the visible sets, however they were assigned: with one expert for every id, any mask is rank-local.

    Args:
        mask: the routing mask.
        num_ranks: which have equal, contiguous shares of the experts.

    Returns:
        int16 [tables, rows]; None if an id sees experts of two ranks in a layer.
    """
    visible = unpack_bits(mask.visible_bits, mask.num_experts)  # [tables, rows, experts]
    sees_rank = visible.reshape(*visible.shape[:2], num_ranks, -1).any(axis=-1)  # [tables, rows, ranks]
    # Of the ids: some tables have rows that no id uses.
    num_ranks_of_id = np.take_along_axis(sees_rank.sum(axis=-1), mask.row_of_id.astype(np.int64), axis=1)
    return sees_rank.argmax(axis=-1).astype(np.int16) if (num_ranks_of_id == 1).all() else None
