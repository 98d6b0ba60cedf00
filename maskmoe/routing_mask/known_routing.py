"""What token ids tell about MoE layers before the first layer runs."""

from dataclasses import dataclass

import numpy as np

from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask, unpack_bits


@dataclass(frozen=True)
class ExpertLayout:
    """How a model uses its experts, without groups of experts and without a capacity factor.

    Attributes:
        topk: k, the most experts that a token uses in a layer.
        expert_model_parallel_size: Number of ranks, each of which has an equal, contiguous share of the experts.
    """

    topk: int
    expert_model_parallel_size: int = 1


@dataclass(frozen=True)
class KnownRouting:
    """What is known about the tokens of a micro-batch in one layer.

    Attributes:
        visible: Bool [tokens, experts], the visible set of each token.
        is_exact: Bool [tokens], whether the token uses all its visible experts, because it sees at most k.
        least_rows: Int64 [ranks], the tokens that certainly need each rank.
        most_rows: Int64 [ranks], the tokens that may need each rank. Equal to `least_rows` if no token's experts are on
            several ranks, or all tokens are exact.
    """

    visible: np.ndarray
    is_exact: np.ndarray
    least_rows: np.ndarray
    most_rows: np.ndarray

    @property
    def tokens_per_expert(self) -> np.ndarray | None:
        """The tokens of each expert, int64 [experts]; None unless all tokens are exact."""
        return self.visible.sum(axis=0) if self.is_exact.all() else None


def plan(ids: np.ndarray, mask: RoutingMask, layout: ExpertLayout) -> list[KnownRouting]:
    """Return what token ids, integers of any shape, tell about each layer of the mask.

    Args:
        ids: The ids of the tokens of a micro-batch. The results have them flattened.
        mask: The routing mask of the model.
        layout: How the model uses its experts.

    Raises:
        UserError: An id is outside the mask's vocabulary, or the ranks cannot share the experts equally.
    """
    ids, num_ranks = np.asarray(ids).ravel(), layout.expert_model_parallel_size
    if len(ids) and not 0 <= ids.min() <= ids.max() < mask.vocab_size:
        raise UserError(f"the mask has ids 0 to {mask.vocab_size - 1}, the tokens have {ids.min()} to {ids.max()}")
    if mask.num_experts % num_ranks:
        raise UserError(f"{num_ranks} ranks cannot share {mask.num_experts} experts equally: choose a divisor")
    tables = [_plan_table(ids, mask, table, layout) for table in range(len(mask.row_of_id))]
    return tables * mask.num_layers if mask.is_shared else tables


def _plan_table(ids: np.ndarray, mask: RoutingMask, table: int, layout: ExpertLayout) -> KnownRouting:
    """Return what the ids [tokens] tell about the layers that use a table."""
    rows = mask.row_of_id[table, ids]
    visible = unpack_bits(mask.visible_bits[table, rows], mask.num_experts)
    num_ranks = layout.expert_model_parallel_size
    ranks = visible.reshape(len(ids), num_ranks, mask.num_experts // num_ranks).any(axis=-1)  # [tokens, ranks]
    is_exact = mask.row_sizes[table, rows] <= layout.topk
    is_certain = is_exact | (ranks.sum(axis=-1) == 1)
    return KnownRouting(visible, is_exact, ranks[is_certain].sum(axis=0), ranks.sum(axis=0))
