"""torch's norms in a tensor and sequence parallel model."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


def build_torch_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused
) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
    """Build the norm of `WrappedTorchNorm`, also for sequence parallelism, which that class refuses.

    A rank's gradient of the norm's weight then covers its part of the sequence only. Marking the parameters
    `sequence_parallel` makes Megatron-Core's `finalize_model_grads` add the parts up.

    Args:
        config: the model's configuration; `normalization` is LayerNorm or RMSNorm.
        hidden_size: size of the normalised dimension.
        eps: added to the variance.
        unused: arguments of other norms that the specs may pass.

    Raises:
        ValueError: a setting that torch's norms do not have.
    """
    if config.layernorm_zero_centered_gamma:
        raise ValueError("--apply-layernorm-1p needs Transformer Engine: torch's norms have no zero-centred weight")
    if config.normalization not in _NORMS:
        raise ValueError(f"normalization {config.normalization} needs Transformer Engine; use one of {list(_NORMS)}")
    norm = _NORMS[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return norm
