"""Hold the results of a simulation."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from maskmoe.simulation.layout import Layout
from maskmoe.simulation.variants import Variant
from maskmoe.transformer.dispatch.kind import DispatchKind


@dataclass(frozen=True)
class Cost:
    """Cost of dispatch in one layer and one step of one micro-batch, forward and backward, without recomputation.

    Attributes:
        bytes_own: Bytes that a rank puts into all collectives for itself; mean over ranks.
        bytes_node: Bytes that a rank puts into all collectives for other GPUs of its node; mean over ranks.
        bytes_across: Bytes that a rank puts into all collectives for other nodes; mean over ranks.
        rows: Hidden states that a rank receives in one all-to-all, including those from itself; mean over ranks.
        max_rows: Maximum of `rows` over ranks.
        load: Tokens times selected experts that a rank computes; mean over ranks.
        max_load: Maximum of `load` over ranks.
        expected_imbalance: Maximum over mean of the load that is expected from the frequencies of the dataset's ids.
        all_to_all_seconds: Time of one all-to-all of hidden states.
        seconds: Time of all collectives.
    """

    bytes_own: float
    bytes_node: float
    bytes_across: float
    rows: float
    max_rows: float
    load: float
    max_load: float
    expected_imbalance: float
    all_to_all_seconds: float
    seconds: float

    @property
    def imbalance(self) -> float:
        """Maximum over mean of the load of the ranks."""
        return self.max_load / self.load

    @classmethod
    def mean(cls, costs: Sequence["Cost"]) -> "Cost":
        """Return the mean of each field over the costs of several layers."""
        return cls(*np.mean([astuple(cost) for cost in costs], axis=0).tolist())


@dataclass(frozen=True)
class Result:
    """Result of one variant on one layout.

    Attributes:
        layout: The ranks.
        topk: k, the number of experts of a token.
        variant: The way to train.
        dispatch: The way to dispatch, which is planned if the mask allows it.
        cost: Mean cost over the simulated layers; None if the variant is impossible.
        impossible: Reason why the variant is impossible; None if it is possible.
    """

    layout: Layout
    topk: int
    variant: Variant
    dispatch: DispatchKind
    cost: Cost | None = None
    impossible: str | None = None
