"""What a simulation finds out."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from maskmoe.simulation.layout import Layout
from maskmoe.simulation.variants import Variant
from maskmoe.transformer.dispatch.kind import DispatchKind


@dataclass(frozen=True)
class Cost:
    """What dispatch costs a layer in one step of one micro-batch, forward and backward, without recomputation.

    Attributes:
        bytes_own, bytes_node, bytes_across: that a rank puts into all collectives for itself, for other GPUs of its
            node, and for other nodes; mean over ranks.
        rows, max_rows: hidden states that a rank receives in one all-to-all, its own among them; mean and maximum.
        load, max_load: tokens times selected experts that a rank computes; mean and maximum.
        expected_imbalance: maximum over mean of the load that follows from how often ids occur in the dataset.
        all_to_all_seconds: of one all-to-all of hidden states.
        seconds: of all collectives.
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
        """Maximum over mean of the load."""
        return self.max_load / self.load

    @classmethod
    def mean(cls, costs: Sequence["Cost"]) -> "Cost":
        """Of several layers."""
        return cls(*np.mean([astuple(cost) for cost in costs], axis=0).tolist())


@dataclass(frozen=True)
class Result:
    """What became of a variant on a number of GPUs.

    Attributes:
        layout: the ranks.
        topk: k.
        variant: the way to train.
        dispatch: how tokens travel in it.
        cost: mean over the simulated layers; None if the variant is impossible.
        impossible: why; None if it is not.
    """

    layout: Layout
    topk: int
    variant: Variant
    dispatch: DispatchKind
    cost: Cost | None = None
    impossible: str | None = None
