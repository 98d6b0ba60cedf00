"""The norm of OLMoE over all heads of the queries or keys together."""

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

    The module replaces the norm of each head in Megatron-Core's `SelfAttention`. Heads are divided over the
    tensor-parallel ranks, so the ranks add up their squares. Every rank holds the whole weight, as for the replaced
    norm: `finalize_model_grads` finds the weight by its name and adds the gradients of all ranks, and a checkpoint fits
    any layout.

    Args:
        config: the model's configuration; `normalization` must be RMSNorm.
        hidden_size: features of one head.
        eps: added to the mean of the squares.
        num_heads: heads of the model. If there are fewer heads than ranks, neighbouring ranks hold the same head.
        tp_group: the tensor-parallel ranks; None: the ranks of `parallel_state`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        group = tp_group or parallel_state.get_tensor_model_parallel_group()
        assert group is not None
        self.tp_group = group
        self.eps = eps
        self.num_features = num_heads * hidden_size
        tp_size = self.tp_group.size()
        self._num_copies = max(1, tp_size // num_heads)
        first_head = self.tp_group.rank() * num_heads // tp_size
        num_local_heads = max(1, num_heads // tp_size)
        self._local = slice(first_head * hidden_size, (first_head + num_local_heads) * hidden_size)
        self.weight = torch.nn.Parameter(torch.ones(self.num_features, dtype=config.params_dtype))

    def forward(self, heads: Tensor) -> Tensor:
        """Normalize the features of all heads of each token; computed in fp32.

        Args:
            heads: [sequence, batch, heads of this rank, features of one head].

        Returns:
            the normalized features, same shape and dtype.
        """
        features = heads.flatten(2).float()  # [sequence, batch, features of this rank]
        squares = features.square().sum(dim=-1, keepdim=True)
        # The output of each rank depends on the squares of all ranks: add squares forward, and gradients backward.
        squares = reduce_from_tensor_model_parallel_region(squares, self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, self.tp_group)
        mean_square = squares / (self.num_features * self._num_copies)
        normalized = features * torch.rsqrt(mean_square + self.eps) * self.weight[self._local].float()
        return normalized.to(heads.dtype).view_as(heads)
