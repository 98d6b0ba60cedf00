"""Small experts of Megatron-Core's local spec, and rows for them."""

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from support.small_moe import DEVICE, process_groups
from torch import Tensor


def make_experts[Experts: SequentialMLP](kind: type[Experts], config: TransformerConfig) -> Experts:
    """Build experts of the local spec, with weights that depend on the configuration only."""
    experts = kind(
        config.num_moe_experts,
        config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        process_groups(),
    ).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return experts


def make_rows(
    experts: SequentialMLP, tokens_per_expert: list[int], seed: int = 0, probs_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows, their weights, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    number, config = sum(tokens_per_expert), experts.config
    shape = number, config.hidden_size
    rows, gradient = (torch.randn(shape, generator=generator).to(DEVICE, config.params_dtype) for _ in range(2))
    probs = torch.rand(number, generator=generator).to(DEVICE, probs_dtype)
    return rows.requires_grad_(), probs.requires_grad_(), gradient
