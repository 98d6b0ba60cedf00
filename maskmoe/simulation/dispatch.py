"""List the collectives that each way to dispatch tokens runs in a layer."""

from dataclasses import dataclass

from maskmoe.errors import UserError
from maskmoe.simulation.layout import Layout
from maskmoe.simulation.traffic import Traffic
from maskmoe.transformer.dispatch.kind import DispatchKind

_WEIGHT_BYTES = 4  # routers compute in fp32
_COUNT_BYTES = 8
_ID_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """Sizes of the data that MoE layers move in one micro-batch.

    Attributes:
        topks: Different values of k to compare.
        tokens_per_rank: Tokens of a micro-batch on each rank.
        hidden_size: Elements of a hidden state.
        bytes_per_element: Bytes of an element of a hidden state or its gradient.
        num_experts: N, the number of experts in a layer.
        num_layers: Number of layers that share the plan of a micro-batch, if dispatch is planned.

    Raises:
        UserError: A size is not positive, or a k is not between 1 and the number of experts.
    """

    topks: tuple[int, ...]
    tokens_per_rank: int
    hidden_size: int
    bytes_per_element: int
    num_experts: int
    num_layers: int

    def __post_init__(self) -> None:
        for name in ("tokens_per_rank", "hidden_size", "bytes_per_element"):
            if getattr(self, name) < 1:
                raise UserError(f"{name.replace('_', ' ')} must be at least 1, not {getattr(self, name)}")
        for topk in self.topks:
            if not 1 <= topk <= self.num_experts:
                raise UserError(f"top-k must be 1 to {self.num_experts}, the number of experts, not {topk}")


@dataclass(frozen=True)
class Exchange:
    """A kind of collective that a layer runs.

    Attributes:
        content: Name of the data that the collective carries.
        calls: Calls in one layer and step, forward and backward; less than 1 if several layers share a call.
        traffic: Rows of one call. In calls of the opposite direction, sent and received rows are swapped.
        bytes_per_row: Size of a row in bytes.
    """

    content: str
    calls: float
    traffic: Traffic
    bytes_per_row: int


def exchanges(dispatch: DispatchKind, traffic: Traffic, layout: Layout, workload: Workload) -> tuple[Exchange, ...]:
    """Return all collectives of one layer and step, for one micro-batch without recomputation.

    The first exchange carries hidden states. Hidden states are dispatched and combined, and so are their gradients:
    four all-to-alls. Each way to dispatch adds further collectives:

    - Megatron's dispatcher (`MoEAlltoAllTokenDispatcher`) also sends the probability of each row, and its gradient
      back, which makes six all-to-alls. Before these, all ranks gather the number of rows of each rank for each expert.
    - One-copy dispatch also sends, with each row, the weights of the receiving rank's experts, and their gradients
      back, which makes six all-to-alls. Before these, every rank reports to every other rank the number of rows that it
      sends and the experts that the rows are for.
    - Planned dispatch gathers the token ids of all ranks, once for all layers.

    Args:
        dispatch: The way to dispatch.
        traffic: Rows of hidden states that ranks send in the dispatch.
        layout: The ranks.
        workload: Sizes of the data.
    """
    hidden = Exchange("hidden states", 4, traffic, workload.hidden_size * workload.bytes_per_element)
    if dispatch is DispatchKind.PLANNED:
        ids = workload.tokens_per_rank * _ID_BYTES
        return hidden, Exchange("token ids", 1 / workload.num_layers, Traffic.to_every_peer(layout), ids)
    if dispatch is DispatchKind.STOCK:
        weights_per_row, counts = 1, workload.num_experts
    else:
        weights_per_row = workload.num_experts // layout.ep_size
        counts = 1 + weights_per_row
    return (
        hidden,
        Exchange("weights", 2, traffic, weights_per_row * _WEIGHT_BYTES),
        Exchange("counts", 1, Traffic.to_every_peer(layout), counts * _COUNT_BYTES),
    )
