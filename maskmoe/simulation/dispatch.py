"""What the ways to dispatch tokens put on the wire, beside the tokens themselves."""

from dataclasses import dataclass

from maskmoe.errors import UserError
from maskmoe.simulation.layout import Layout
from maskmoe.simulation.traffic import Traffic
from maskmoe.transformer.dispatch.kind import DispatchKind

_WEIGHT_BYTES = 4
"""Routers compute in fp32."""
_COUNT_BYTES = 8
_ID_BYTES = 4


@dataclass(frozen=True)
class Workload:
    """What MoE layers have to move in one micro-batch.

    Attributes:
        topks: values of k to compare, each once.
        tokens_per_rank: of one micro-batch.
        hidden_size: elements of a hidden state.
        bytes_per_element: of hidden states and their gradients.
        num_experts: N.
        num_layers: layers that share one plan of a micro-batch.

    Raises:
        UserError: a size is not positive, or a k not between 1 and the number of experts.
    """

    topks: tuple[int, ...]
    tokens_per_rank: int
    hidden_size: int
    bytes_per_element: int
    num_experts: int
    num_layers: int

    def __post_init__(self) -> None:
        for what in ("tokens_per_rank", "hidden_size", "bytes_per_element"):
            if getattr(self, what) < 1:
                raise UserError(f"{what.replace('_', ' ')} must be at least 1, not {getattr(self, what)}")
        for topk in self.topks:
            if not 1 <= topk <= self.num_experts:
                raise UserError(f"top-k must be 1 to {self.num_experts}, the number of experts, not {topk}")


@dataclass(frozen=True)
class Exchange:
    """A kind of collective that a layer runs.

    Attributes:
        what: it carries.
        calls: of a layer and step, forward and backward; less than 1 where layers share it.
        traffic: rows of one call; of the calls that go back, sent and received are exchanged.
        bytes_per_row: of one call.
    """

    what: str
    calls: float
    traffic: Traffic
    bytes_per_row: int


def exchanges(dispatch: DispatchKind, traffic: Traffic, layout: Layout, workload: Workload) -> tuple[Exchange, ...]:
    """All collectives of one layer and step, for one micro-batch without recomputation.

    Hidden states go there and back, and so do their gradients: four all-to-alls. Beside these,

    - Megatron's dispatcher (`MoEAlltoAllTokenDispatcher`) sends each row's probability, and its gradient back: six
      all-to-alls in all. Before that, all ranks gather how many rows each has for each expert.
    - one copy a rank (`OneCopyDispatcher`) sends the weights of the receiving rank's experts with each row, and their
      gradients back: six in all. Before that, every rank tells each other how many rows it sends and for which experts.
    - planned dispatch (`DispatchPlanner`) gathers the token ids of all ranks, once for all layers.

    Args:
        dispatch: the way.
        traffic: rows of hidden states from each rank to the others.
        layout, workload: the run.
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
