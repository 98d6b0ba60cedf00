"""MLPs of Megatron-Core whose SwiGLU keeps less for the backward pass."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from maskmoe.transformer.torch_modules.swiglu import is_plain_swiglu, swiglu


class TorchMLP(MLP):
    """`MLP` with the same parameters, checkpoints and bits, whose SwiGLU keeps only its input.

    `MLP` computes settings that `is_plain_swiglu` excludes, and weighted rows.

    Args: those of `MLP`.
    """

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the MLP.

        Args:
            hidden_states: [sequence, batch, hidden].
            per_token_scale: the weight of each row, or None.
            kwargs: further arguments of `MLP.forward`.

        Returns:
            [sequence, batch, hidden] and the bias that is still to be added, or None.
        """
        if per_token_scale is not None or not is_plain_swiglu(self.config):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        first: Any = self.linear_fc1
        second: Any = self.linear_fc2
        projected, _ = first(hidden_states)
        return second(swiglu(projected))


class TorchSharedExpertMLP(SharedExpertMLP, TorchMLP):  # pyrefly: ignore[inconsistent-inheritance]
    """`SharedExpertMLP` whose MLP is a `TorchMLP`.

    With `moe_shared_expert_overlap`, the steps of `SharedExpertMLP` compute the activation function.
    """
