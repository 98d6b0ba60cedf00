"""Norms of torch for tensor- and sequence-parallel models."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def build_torch_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any
) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
    """Build the norm that `WrappedTorchNorm` builds, also under sequence parallelism, which `WrappedTorchNorm` refuses.

    Under sequence parallelism, the gradient of the norm's weight covers only this rank's part of the sequence. Marking
    the parameters `sequence_parallel` makes Megatron-Core's `finalize_model_grads` add the gradients of all ranks.

    Args:
        config: the model's configuration; `normalization` is LayerNorm or RMSNorm.
        hidden_size: size of the normalized dimension.
        eps: added to the variance.
        unused: arguments for other norms, which the specs may pass; ignored.

    Raises:
        ValueError: torch has no norm for these settings.
    """
    if config.layernorm_zero_centered_gamma:
        raise ValueError("--apply-layernorm-1p needs Transformer Engine: torch's norms have no zero-centred weight")
    if config.normalization not in _NORMS:
        raise ValueError(f"normalization {config.normalization} needs Transformer Engine; use one of {list(_NORMS)}")
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]
    return norm
