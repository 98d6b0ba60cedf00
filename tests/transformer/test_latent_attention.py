"""Multi-latent attention of local modules against the attention of transformers, in fp32."""

from contextlib import nullcontext

import pytest
import torch
from support.latent_attention import YARN, AttentionOfTransformers, make_latent_attention
from support.small_moe import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel


@pytest.mark.parametrize(
    ("fused", "tolerance"),
    [
        (False, 1e-5),
        # The fused kernel computes attention weights again in the backward pass, from scores and sums that are rounded
        # to fp32. Scores are up to 82 here, so the weights are off by up to 1e-5. Compared with float64, the largest
        # error of a gradient is 2.1e-5 of the largest value (`kv_layernorm.weight` with YaRN). If the weights are kept,
        # this error is 1.2e-5, and it is 0.9e-5 in transformers.
        (True, 3e-5),
    ],
    ids=["weights kept", "fused kernel"],
)
@pytest.mark.parametrize("rank", [10, None], ids=["compressed queries", "whole queries"])
@pytest.mark.parametrize("rope", [{}, {"rope_type": "yarn", **YARN}], ids=["rope", "yarn"])
def test_equals_attention_of_transformers(rope: dict, rank: int | None, fused: bool, tolerance: float) -> None:
    """fp32 sums are added in another order; the largest values are near 30."""
    ours = make_latent_attention(q_lora_rank=rank, **rope)
    theirs = AttentionOfTransformers(ours)
    hidden = torch.randn(20, 2, 16, device=DEVICE)
    of_ours, of_theirs = (hidden.clone().requires_grad_() for _ in range(2))
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool, device=DEVICE).triu(1)
    with nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
        output, _ = ours(of_ours, mask)
        gradient = torch.randn_like(output)
        output.backward(gradient)
    expected = theirs(of_theirs)
    expected.backward(gradient)
    found = {"output": output, "input": of_ours.grad} | {name: p.grad for name, p in ours.named_parameters()}
    reference = {"output": expected, "input": of_theirs.grad}
    reference |= {name: p.grad for name, p in theirs.parameters_by_our_names().items()}
    assert found.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * value.abs().max().item(), msg=name)
