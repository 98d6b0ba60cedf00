"""Statistics of routing in training: summed on the device in every micro-batch, read when they are logged."""

from typing import NamedTuple

import torch
from torch import Tensor

from maskmoe.transformer.selection import MaskedLogits
from maskmoe.transformer.token_sums import Columns, sum_columns


class RoutingSums(NamedTuple):
    """Sums over tokens, micro-batches and ranks, of one layer or of several layers in leading dimensions.

    Attributes:
        num_tokens: Scalar, tokens without padding.
        num_routable: Scalar, tokens without padding that have two or more visible experts.
        entropy: Scalar, summed entropies of the routable tokens' masked probabilities, in nats.
        tokens_per_expert: [experts], the tokens sent to each expert.
    """

    num_tokens: Tensor
    num_routable: Tensor
    entropy: Tensor
    tokens_per_expert: Tensor

    @classmethod
    def packed_size(cls, num_experts: int) -> int:
        """Return the size of the tensor that `sum_tokens` returns."""
        return len(cls._fields) - 1 + num_experts

    @classmethod
    def unpack(cls, packed: Tensor) -> "RoutingSums":
        """Split a tensor `[..., packed_size]` into its sums."""
        num_scalars = len(cls._fields) - 1
        return cls._make((*packed[..., :num_scalars].unbind(-1), packed[..., num_scalars:]))


@torch.no_grad()
def columns_of_statistics(logits: MaskedLogits, routing_map: Tensor) -> Columns:
    """Return what is summed for the fields of `RoutingSums`: [tokens, 3 + experts]."""
    is_real, routable = logits.is_real, logits.visible.routable
    entropy = torch.special.entr(logits.normalized_scores).sum(dim=-1)  # [tokens]
    real = torch.ones_like(entropy) if is_real is None else is_real.to(entropy.dtype)
    routable = real if routable is None else routable * real
    if is_real is not None:
        routing_map = routing_map & is_real.unsqueeze(-1)
    per_token = torch.stack([real, routable, entropy * routable], dim=1)
    return Columns(torch.cat([per_token, routing_map.to(entropy.dtype)], dim=1), torch.float64)


def sum_tokens(logits: MaskedLogits, routing_map: Tensor) -> Tensor:
    """Return float64 [3 + experts], the fields of `RoutingSums`, over the tokens of a micro-batch."""
    (sums,) = sum_columns([columns_of_statistics(logits, routing_map)])
    return sums.squeeze(0)


class RoutingStatistics:
    """Counts what one router does with the tokens of this rank, and the rows that the rank's experts receive.

    The class is not a module and has no buffers, so checkpoints do not hold the sums and `Float16Module` does not
    convert them. Sums are float64, which counts exactly up to 2^53. Nothing waits for the device before `take`.
    """

    def __init__(self) -> None:
        self._clear()

    def add_tokens(self, sums: Tensor) -> None:
        """Add the sums over the tokens of a micro-batch: [3 + experts], as `sum_tokens` returns them."""
        self._tokens = sums.double() if isinstance(self._tokens, int) else self._tokens + sums

    def count_rows(self, num_rows: int) -> None:
        """Count the rows that the experts of this rank receive in one micro-batch.

        The largest number is kept, because memory use depends on the rows of a single micro-batch.
        """
        self._largest_num_rows = max(self._largest_num_rows, num_rows)

    def take(self) -> tuple[int | Tensor, int]:
        """Return the sums since the last call, packed for `RoutingSums`, and the most rows of one micro-batch.

        Without tokens, the sums are the number 0.
        """
        taken = self._tokens, self._largest_num_rows
        self._clear()
        return taken

    def _clear(self) -> None:
        """Set all sums to 0. The first addition makes a tensor on the device of the tokens."""
        self._tokens: int | Tensor = 0  # [3 + experts]
        self._largest_num_rows = 0
