"""Norms of torch in tensor- and sequence-parallel models."""

import pytest
import torch
from support.small_moe import make_config

from maskmoe.transformer.backends.torch_norm import build_torch_norm


@pytest.mark.parametrize("norm_class", [torch.nn.LayerNorm, torch.nn.RMSNorm])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_is_the_norm_of_torch(norm_class: type, sequence_parallel: bool) -> None:
    config = make_config(
        normalization=norm_class.__name__,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=1 + sequence_parallel,
    )
    norm = build_torch_norm(config=config, hidden_size=8, eps=1e-3, persist_layer_norm=True)
    assert type(norm) is norm_class
    hidden = torch.randn(3, 2, 8)
    assert torch.equal(norm(hidden), norm_class(8, eps=1e-3)(hidden))
    assert all(parameter.sequence_parallel is sequence_parallel for parameter in norm.parameters())
    assert len(list(norm.parameters())) == (2 if norm_class is torch.nn.LayerNorm else 1)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [("layernorm_zero_centered_gamma", True, "--apply-layernorm-1p"), ("normalization", "L2Norm", "L2Norm")],
)
def test_refuses_norms_that_torch_lacks(setting: str, value: object, message: str) -> None:
    config = make_config()
    setattr(config, setting, value)
    with pytest.raises(ValueError, match=message):
        build_torch_norm(config, 8)
