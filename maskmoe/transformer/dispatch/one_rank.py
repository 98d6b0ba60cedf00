"""Dispatch within one rank of a CPU: rows are copied to the experts, and nothing is sent."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Size, Tensor

from maskmoe.transformer.dispatch.protocol import Dispatched, Router
from maskmoe.transformer.dispatch.to_experts import CopyToExperts
from maskmoe.transformer.token_ids import TokenIds


@dataclass(frozen=True)
class OneRankWayBack:
    """How the experts' outputs come back to the tokens.

    Attributes:
        sum_outputs: adds up the outputs [copies, features] of each token: [tokens, features].
        shape: [sequence, batch, features].
    """

    sum_outputs: Callable[[Tensor], Tensor]
    shape: Size


class OneRankDispatcher:
    """Copies each token to its experts, and adds up the experts' outputs of each token.

    Results and gradients are bit-equal to those of `MoEAlltoAllTokenDispatcher` with one rank. That class sorts all
    pairs of a token and an expert, and copies the rows twice in each direction. This class finds the chosen pairs
    without a sort, and copies the rows once.

    Args:
        config: the model's configuration; one rank holds all experts.
        compress: maps hidden states [sequence, batch, hidden] to the width of the experts.
        expand: maps the width of the experts to the width of hidden states.
    """

    def __init__(
        self, config: TransformerConfig, compress: Callable[[Tensor], Tensor], expand: Callable[[Tensor], Tensor]
    ) -> None:
        assert config.num_moe_experts is not None
        self._compress, self._expand = compress, expand
        # The outputs live on in the layers that follow, so they are not in a buffer.
        self._copy_to_experts = CopyToExperts(
            slice(0, config.num_moe_experts), config.moe_router_topk, None, config.moe_permute_fusion
        )

    def route_and_dispatch(self, hidden_states: Tensor, token_ids: TokenIds, router: Router) -> Dispatched:
        """Choose experts and copy one row to each; see `Dispatcher`."""
        probs, routing_map = router(hidden_states, token_ids)
        tokens_per_expert = routing_map.sum(dim=0)
        compressed = self._compress(hidden_states)
        rows = self._copy_to_experts(compressed.flatten(0, 1), probs, routing_map, int(tokens_per_expert.sum()))
        return Dispatched(
            expert_input=rows.values,
            tokens_per_expert=tokens_per_expert,
            weights=rows.weights,
            metadata=OneRankWayBack(rows.sum_outputs, compressed.shape),
        )

    def combine(self, expert_output: Tensor, metadata: OneRankWayBack) -> Tensor:
        """Add up the outputs of each token; see `Dispatcher`."""
        return self._expand(metadata.sum_outputs(expert_output).view(metadata.shape))
