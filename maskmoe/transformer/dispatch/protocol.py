"""The protocol of all ways to dispatch, and what a dispatcher needs from a router.

A dispatcher is not a module and keeps no state of a micro-batch: `Dispatched.combine` holds what the way back needs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds


@dataclass(frozen=True)
class Dispatched:
    """The input of this rank's experts.

    Attributes:
        expert_input: [rows, hidden], ordered by expert.
        tokens_per_expert: Integers [local experts], the rows of each expert.
        weights: [rows], the weight of each row.
        combine: Sends the experts' weighted outputs [rows, hidden] back and adds them up for each token: [sequence,
            batch, hidden].
    """

    expert_input: Tensor
    tokens_per_expert: Tensor
    weights: Tensor
    combine: Callable[[Tensor], Tensor]


class Router(Protocol):
    """The interface of `MaskMoERouter` that dispatchers use."""

    @property
    def table(self) -> int:
        """The table of the routing mask that the router's layer uses."""
        ...

    @property
    def fixed_weight(self) -> float | None:
        """The weight of every token if no choice of the router matters where each id sees one expert; else None."""
        ...

    def __call__(self, hidden_states: Tensor, token_ids: TokenIds, /) -> tuple[Tensor, Tensor]:
        """Route tokens [sequence, batch, hidden]; return weights and routing map, [tokens, experts] each."""
        ...

    def count(self, statistics: Tensor, /) -> None:
        """Count tokens that are sent to their experts without a call of the router; see `sum_tokens`."""
        ...


class Dispatcher(Protocol):
    """One way to send tokens to their experts and the experts' outputs back."""

    def start_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Callable[[], Dispatched]:
        """Start to choose experts for this rank's tokens and to send the tokens to the ranks of their experts.

        The dispatcher calls the router, because experts may be chosen before tokens are sent or where they arrive.

        Args:
            hidden_states: [sequence, batch, hidden].
            token_ids: The ids [sequence, batch] of the same tokens.
            router: Chooses the experts and attaches its losses.

        Returns:
            A function that waits for the tokens. Until the caller calls the function, the caller can compute what does
            not depend on the tokens of other ranks.
        """
        ...
