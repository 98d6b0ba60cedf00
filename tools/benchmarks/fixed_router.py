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
    """

    probs: Tensor
    routing_map: Tensor
    table: int = 0

    def __call__(
        self, hidden_states: Tensor, token_ids: TokenIds, attaches_losses: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return weights and choices."""
        return self.probs, self.routing_map

    def attach_losses(self, activation: Tensor, hidden_states: Tensor, token_ids: TokenIds) -> Tensor:
        """Return the activation; there are no losses."""
        return activation
