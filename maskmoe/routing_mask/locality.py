"""Whether the visible experts of every id are on one rank, and on which."""

import numpy as np

from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


def is_rank_local(mask: RoutingMask, num_ranks: int) -> bool:
    """Whether no id sees experts of two ranks in a layer; ranks have equal, contiguous shares of the experts.

    It goes by the visible sets, however they were assigned: with one expert for every id, any mask is rank-local.
    """
    num_ranks_of_row = _sees_rank(mask, num_ranks).sum(axis=-1)  # [tables, rows]
    # Of the rows; some tables have rows that no id uses.
    return bool((np.take_along_axis(num_ranks_of_row, mask.row_of_id.astype(np.int64), axis=1) == 1).all())


def rank_of_row(mask: RoutingMask, num_ranks: int) -> np.ndarray:
    """The rank of the visible experts of each row of a rank-local mask's `visible_bits`: int16 [tables, rows]."""
    return _sees_rank(mask, num_ranks).argmax(axis=-1).astype(np.int16)


def num_visible_of_row(mask: RoutingMask) -> np.ndarray:
    """The number of visible experts of each row of a mask's `visible_bits`: int16 [tables, rows]."""
    return unpack_bits(mask.visible_bits, mask.num_experts).sum(axis=-1).astype(np.int16)


def _sees_rank(mask: RoutingMask, num_ranks: int) -> np.ndarray:
    """bool [tables, rows, ranks]."""
    visible = unpack_bits(mask.visible_bits, mask.num_experts)  # [tables, rows, experts]
    return visible.reshape(*visible.shape[:2], num_ranks, -1).any(axis=-1)
