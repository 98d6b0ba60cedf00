"""The protocol of everything that accompanies a training run: what is called, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """The results of one training step on this rank.

    Attributes:
        iteration: The number of the step, from 1.
        samples: The samples of the global batch.
        losses: The mean losses of the batch by name, on the last pipeline stage; empty on other stages.
        grad_norm: The norm of the gradient before clipping; None if it was not computed.
        has_updated: Whether the weights were updated. They are not if the gradient is not finite in fp16, or if
            Megatron ends the run after this step.
    """

    iteration: int
    samples: int
    losses: Mapping[str, Tensor]
    grad_norm: float | None
    has_updated: bool


class Callback:
    """Accompanies a training run. All ranks call each method, which may be a collective call, in this order."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The run resumes from a checkpoint with this state of the callback."""

    def on_model_built(self, chunks: Sequence[Any]) -> None:
        """The model is built on this rank, but has no weights of a checkpoint yet and is not wrapped."""

    def before_micro_batch(self) -> None:
        """A micro-batch begins, in training or validation."""

    def after_gradients(self, chunks: Sequence[Any]) -> None:
        """The gradients of a step are summed over micro-batches and ranks, and not yet clipped."""

    def after_step(self, step: Step) -> None:
        """A training step is done; no checkpoint holds its update yet."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint must hold to resume the callback, equal on all ranks: plain values."""
        return {}

    def on_end(self, error: BaseException | None) -> None:
        """The run ends; `error` is a `SystemExit` if the run stops early, and None if training is complete."""
