"""Plans of dispatch: where the tokens of a micro-batch go in every layer, known before the first layer runs."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from maskmoe.transformer.dispatch.rows import RowCopies


@dataclass(frozen=True)
class LayerPlan:
    """How the tokens of a micro-batch travel in the layers that use one table of the routing mask.

    Attributes:
        to_ranks: One copy of each of this rank's tokens, ordered by destination rank.
        rows_to: The number of rows sent to each expert-parallel rank.
        rows_from: The number of rows received from each expert-parallel rank.
        received_ids: Int64 [rows, 1], the ids of the received tokens.
        received_padding: Bool [rows, 1], True where a received token is padding; None if no token is padding.
        num_selected: The sum of `min(k, V)` over the received tokens.
    """

    to_ranks: RowCopies
    rows_to: tuple[int, ...]
    rows_from: tuple[int, ...]
    received_ids: Tensor
    received_padding: Tensor | None
    num_selected: int


DispatchPlan = Mapping[int, LayerPlan]
"""The plan of a micro-batch for all layers of a pipeline stage, by the number of the mask's table that a layer uses."""
