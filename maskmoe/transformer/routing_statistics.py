"""What the routers did in training, summed on the device as it happens, and read when it is logged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskmoe.transformer.losses import normalized_scores

_NUM_SCALARS = 5


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, micro-batches and ranks; of one layer, or of several in front of the dimensions given here.

    Attributes:
        num_tokens: scalar, without padding.
        num_routable: scalar, those of them with two or more visible experts.
        entropy: scalar, the entropies of the routable tokens' masked probabilities, in nats.
        num_rows: scalar, rows that ranks gave to their experts.
        num_micro_batches: scalar, how often a rank did so.
        tokens_per_expert: [experts], the tokens sent to each.
    """

    num_tokens: Tensor
    num_routable: Tensor
    entropy: Tensor
    num_rows: Tensor
    num_micro_batches: Tensor
    tokens_per_expert: Tensor

    @staticmethod
    def packed_size(num_experts: int) -> int:
        """The size of what `RoutingStatistics.take` returns."""
        return _NUM_SCALARS + num_experts

    @classmethod
    def unpack(cls, packed: Tensor) -> "RoutingSums":
        """From `[..., packed_size]`."""
        return cls(*packed[..., :_NUM_SCALARS].unbind(-1), packed[..., _NUM_SCALARS:])


class RoutingStatistics:
    """Counts what one router does with the tokens of this rank, and how many rows the rank's experts get.

    Neither a module nor buffers of one: checkpoints hold nothing of it, and `Float16Module` leaves it alone. Sums are
    float64, in which counts are exact up to 2^53. Nothing waits for the device until `take`.

    Args:
        num_experts: N.
    """

    def __init__(self, num_experts: int):
        self._num_experts = num_experts
        self._clear()

    @torch.no_grad()
    def count_tokens(
        self, logits: Tensor, routing_map: Tensor, routable: Tensor | None, real: Tensor | None, score_function: str
    ) -> None:
        """Count the tokens of a micro-batch.

        Args:
            logits: [tokens, experts], -inf for invisible experts.
            routing_map: bool [tokens, experts], the experts that the tokens are sent to.
            routable: bool [tokens], those with two or more visible experts; None: all.
            real: bool [tokens], those that are no padding; None: all.
            score_function: of the router, see `normalized_scores`.
        """
        entropy = torch.special.entr(normalized_scores(logits, score_function)).sum(dim=-1)  # [tokens]
        if real is not None:
            routing_map = routing_map & real.unsqueeze(-1)
            routable = real if routable is None else routable & real
        num_tokens = entropy.new_full((), len(logits), dtype=torch.float64) if real is None else real.sum()
        num_routable = num_tokens if routable is None else routable.sum()
        if routable is not None:
            entropy = entropy.masked_fill(~routable, 0.0)
        scalars = torch.stack([num_tokens.double(), num_routable.double(), entropy.sum(dtype=torch.float64)])
        sums = torch.cat([scalars, routing_map.sum(dim=0).double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def count_rows(self, experts: torch.nn.Module, inputs: tuple) -> None:
        """Count what the experts of this rank get; a forward pre-hook of theirs, whose first input is [rows, hidden].

        Memory goes by the rows of a micro-batch, so their largest number is kept, too.
        """
        if experts.training and torch.is_grad_enabled():
            num_rows = len(inputs[0])
            self._num_rows += num_rows
            self._num_micro_batches += 1
            self._largest_num_rows = max(self._largest_num_rows, num_rows)

    def take(self) -> tuple[Tensor, int]:
        """The sums since the last call, packed, see `RoutingSums`; and the most rows that a micro-batch had here."""
        sums = self._sums
        if sums is None:
            num_sums = RoutingSums.packed_size(self._num_experts) - 2
            sums = torch.zeros(num_sums, dtype=torch.float64, device=torch.cuda.current_device())
        rows = sums.new_tensor([self._num_rows, self._num_micro_batches])
        taken = torch.cat([sums[:3], rows, sums[3:]]), self._largest_num_rows
        self._clear()
        return taken

    def _clear(self) -> None:
        # float64 [3 + experts]: tokens, routable ones, their entropies, and the tokens of each expert.
        self._sums: Tensor | None = None
        self._num_rows = self._num_micro_batches = self._largest_num_rows = 0
