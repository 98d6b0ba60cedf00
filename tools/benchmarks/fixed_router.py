"""A router whose choices are given beforehand, for tests and benchmarks of dispatchers alone."""

from dataclasses import dataclass

from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds


@dataclass(frozen=True)
class FixedRouter:
    """Returns given weights and choices whatever the tokens are, and has no losses.

    Attributes:
        probs: [tokens, experts], the weights of the experts.
        routing_map: bool [tokens, experts], the selected experts.
        table: the table of the routing mask that plans are read for.
        fixed_weight: the weight of every token, if each id of the table sees one expert; None: weights vary.
    """

    probs: Tensor
    routing_map: Tensor
    table: int = 0
    fixed_weight: float | None = None

    def __call__(self, hidden_states: Tensor, token_ids: TokenIds) -> tuple[Tensor, Tensor]:
        """Return weights and choices."""
        return self.probs, self.routing_map

    def count(self, statistics: Tensor) -> None:
        """Count nothing."""
