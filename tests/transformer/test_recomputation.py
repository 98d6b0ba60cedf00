"""Recomputation of norms, activation functions and up-projections: equal bits, and fewer kept bytes."""

import pytest
import torch
from megatron.core.transformer.transformer_config import MLATransformerConfig
from support import small_moe as moe
from support.small_moe import DEVICE, YARN
from support.tensors import KeptBytes, assert_same_tensors
from torch import Tensor

LENGTH, BATCH, VOCAB_SIZE = 12, 2, 9


def train(modules: tuple[str, ...], normalization: str) -> tuple[dict[str, Tensor], int]:
    """Compute loss and gradients of a model with a dense layer and an MoE layer.

    Args:
        modules: value of `--recompute-modules`; none turns recomputation off.
        normalization: kind of the norms.

    Returns:
        the loss and the gradients, and the kept bytes.
    """
    config = moe.make_config(
        config_class=MLATransformerConfig,
        num_layers=2,
        hidden_size=16,
        moe_layer_freq=[0, 1],
        moe_shared_expert_intermediate_size=10,
        moe_grouped_gemm=True,
        qk_layernorm=True,
        hidden_dropout=0.1,
        normalization=normalization,
        recompute_granularity="selective" if modules else None,
        recompute_modules=list(modules) or None,
        **moe.LATENT_SIZES,
        **YARN,
    )
    model = moe.make_model(config, moe.make_mask(moe.random_visible_sets(1, 2, VOCAB_SIZE, 4)))
    moe.draw_parameters(model)
    tokens = torch.randint(VOCAB_SIZE, (BATCH, LENGTH), device=DEVICE)
    positions = torch.arange(LENGTH, device=DEVICE).expand_as(tokens)
    with KeptBytes([*model.parameters(), *model.buffers()]) as kept:
        loss = model(tokens, positions, None, labels=tokens)
    num_bytes = kept.total()
    loss.mean().backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}, num_bytes


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize(
    "modules",
    [
        ("layernorm",),
        ("moe_act",),
        ("mla_up_proj",),
        ("layernorm", "moe_act", "mla_up_proj", "shared_experts", "mlp"),
        ("layernorm", "moe", "mla_up_proj", "core_attn", "moe_act"),
    ],
    ids="+".join,
)
def test_recomputation_is_bit_equal_and_keeps_less(modules: tuple[str, ...], normalization: str) -> None:
    expected, bytes_without = train((), normalization)
    found, kept = train(modules, normalization)
    assert_same_tensors(found, expected)
    assert kept < 0.99 * bytes_without
