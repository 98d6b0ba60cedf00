"""Statistics of routing in training: summed on the device in every micro-batch, read when they are logged."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe.transformer.selection import MaskedLogits


class RoutingSums(NamedTuple):
    """Sums over tokens, micro-batches and ranks, of one layer or of several layers in leading dimensions.

    Attributes:
        num_tokens: scalar, tokens without padding.
        num_routable: scalar, tokens without padding that have two or more visible experts.
        entropy: scalar, summed entropies of the routable tokens' masked probabilities, in nats.
        num_rows: scalar, rows that the experts of all ranks received.
        num_micro_batches: scalar, micro-batches, counted once for each rank.
        tokens_per_expert: [experts], the tokens sent to each expert.
    """

    num_tokens: Tensor
    num_routable: Tensor
    entropy: Tensor
    num_rows: Tensor
    num_micro_batches: Tensor
    tokens_per_expert: Tensor

    @classmethod
    def packed_size(cls, num_experts: int) -> int:
        """Return the size of the tensor that `RoutingStatistics.take` returns."""
        return len(cls._fields) - 1 + num_experts

    @classmethod
    def unpack(cls, packed: Tensor) -> "RoutingSums":
        """Split a tensor `[..., packed_size]` into its sums."""
        num_scalars = len(cls._fields) - 1
        return cls._make((*packed[..., :num_scalars].unbind(-1), packed[..., num_scalars:]))


class RoutingStatistics:
    """Counts what one router does with the tokens of this rank, and the rows that the rank's experts receive.

    The class is not a module and has no buffers, so checkpoints do not hold the sums and `Float16Module` does not
    convert them. Sums are int64, or float64 for entropies. Nothing waits for the device before `take`.

    Args:
        num_experts: N.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._clear()

    @torch.no_grad()
    def count_tokens(self, logits: MaskedLogits, routing_map: Tensor) -> None:
        """Count the tokens of a micro-batch.

        Args:
            logits: the masked logits of the tokens.
            routing_map: bool [tokens, experts], the experts that the tokens are sent to.
        """
        is_real, routable = logits.is_real, logits.visible.routable
        num_tokens: int | Tensor = len(routing_map)
        if is_real is not None:
            routing_map = routing_map & is_real.unsqueeze(-1)
            routable = is_real if routable is None else routable & is_real
            num_tokens = is_real.sum()
        entropy = torch.special.entr(logits.normalized_scores)  # [tokens, experts]
        if routable is not None:
            entropy = entropy.sum(dim=-1) * routable  # [tokens]
        self._num_tokens += num_tokens
        self._num_routable += num_tokens if routable is None else routable.sum()
        self._entropy += entropy.sum(dtype=torch.float64)
        self._tokens_per_expert += routing_map.sum(dim=0)

    def count_rows(self, num_rows: int) -> None:
        """Count the rows that the experts of this rank receive in one micro-batch.

        The largest number is kept, too, because memory use depends on the rows of a single micro-batch.
        """
        self._num_rows += num_rows
        self._num_micro_batches += 1
        self._largest_num_rows = max(self._largest_num_rows, num_rows)

    def take(self) -> tuple[Tensor, int]:
        """Return the sums since the last call, packed for `RoutingSums`, and the most rows of one micro-batch."""
        device = torch.cuda.current_device()
        scalars = (self._num_tokens, self._num_routable, self._entropy, self._num_rows, self._num_micro_batches)
        packed = [torch.as_tensor(scalar, dtype=torch.float64, device=device).view(1) for scalar in scalars]
        experts = torch.zeros(self._num_experts, dtype=torch.float64, device=device) + self._tokens_per_expert
        taken = torch.cat([*packed, experts]), self._largest_num_rows
        self._clear()
        return taken

    def _clear(self) -> None:
        """Set all sums to 0. The first addition makes them tensors on the device of the tokens."""
        self._num_tokens: int | Tensor = 0
        self._num_routable: int | Tensor = 0
        self._entropy: float | Tensor = 0.0
        self._tokens_per_expert: int | Tensor = 0  # [experts]
        self._num_rows = self._num_micro_batches = self._largest_num_rows = 0
