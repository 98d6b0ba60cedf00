"""The norm of queries and keys over all heads together, as OLMoE has it."""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class AllHeadsRMSNorm(torch.nn.Module):
    """RMSNorm over the features of all heads of a token (OLMoE, arXiv 2409.02060, section 4.2.5).

    It takes the place of the norm of each head in Megatron-Core's `SelfAttention`. Heads are divided over the
    tensor-parallel ranks, so the ranks add up their squares. The weight is whole on every rank, as the weights of the
    norm that it replaces are: `finalize_model_grads` adds up the gradients of both by their names, and a checkpoint
    fits any layout.

    Args:
        config: the model's configuration; `normalization` is RMSNorm.
        hidden_size: features of a head.
        eps: added to the mean of the squares.
        num_heads: heads of the model. Where there are fewer than ranks, neighbouring ranks hold the same head.
        tp_group: the tensor-parallel ranks; by default those of `parallel_state`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__()
        self.tp_group = tp_group or parallel_state.get_tensor_model_parallel_group()
        self.eps = eps
        self.num_features = num_heads * hidden_size
        tp_size = self.tp_group.size()
        self._num_copies = max(1, tp_size // num_heads)
        first_head = self.tp_group.rank() * num_heads // tp_size
        num_local_heads = max(1, num_heads // tp_size)
        self._local = slice(first_head * hidden_size, (first_head + num_local_heads) * hidden_size)
        self.weight = torch.nn.Parameter(torch.ones(self.num_features, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise.

        Args:
            heads: [sequence, batch, heads of this rank, features of a head].

        Returns:
            of the same shape and type; computed in fp32.
        """
        features = heads.flatten(2).float()  # [sequence, batch, features of this rank]
        squares = features.square().sum(dim=-1, keepdim=True)
        # Each rank's output depends on the squares of all: they are summed forward, and their gradients backward.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        mean_square = squares / (self.num_features * self._num_copies)
        normalised = features * torch.rsqrt(mean_square + self.eps) * self.weight[self._local].float()
        return normalised.to(heads.dtype).view_as(heads)
