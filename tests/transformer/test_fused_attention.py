"""Attention by torch's fused kernels against Megatron-Core's `DotProductAttention`."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support.small_moe import DEVICE, make_config, process_groups
from torch import Tensor

from maskmoe.megatron_compat import cpu
from maskmoe.transformer.backends import fused_attention
from maskmoe.transformer.backends.fused_attention import FusedDotProductAttention

SEQUENCE, BATCH, HEADS, CHANNELS = 24, 2, 4, 8
# The modules add in another order. In bf16, the stock module also rounds the scores and the probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(fused_attention, "is_on_cpu", lambda tensor: False)


def build(
    attention: type[DotProductAttention],
    mask_type: AttnMaskType = AttnMaskType.causal,
    layer_number: int = 1,
    softmax_scale: float | None = None,
    **settings: Any,
) -> DotProductAttention:
    """Build a module of core attention."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * CHANNELS, "num_layers": 4}
    config = make_config(**(sizes | settings))
    return attention(
        config, layer_number, mask_type, "self", softmax_scale=softmax_scale, pg_collection=process_groups()
    )


def draw_inputs(groups: int = HEADS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Draw queries, keys and values."""
    torch.manual_seed(0)
    return [
        torch.randn(SEQUENCE, BATCH, heads, CHANNELS, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads in (HEADS, groups, groups)
    ]


def results(attention: DotProductAttention, mask: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    output = attention(*inputs, mask)
    torch.manual_seed(1)
    return [output, *torch.autograd.grad(output, inputs, torch.randn_like(output))]


def random_mask() -> Tensor:
    """Return a causal mask with further pairs that must not see each other, bool [batch, 1, queries, keys]."""
    torch.manual_seed(2)
    hidden = torch.rand(BATCH, 1, SEQUENCE, SEQUENCE, device=DEVICE) < 0.3
    return (hidden | torch.ones_like(hidden).triu(1)) & ~torch.eye(SEQUENCE, dtype=torch.bool, device=DEVICE)


@pytest.fixture
def stock_calls(monkeypatch) -> list[DotProductAttention]:
    """Return the list of the modules whose stock `forward` was called."""
    calls = []
    stock = DotProductAttention.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(self)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(DotProductAttention, "forward", forward)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_query_groups": 2},
        {"softmax_scale": 0.7},
        {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "layer_number": 3},
        {"bf16": True, "params_dtype": torch.bfloat16, "num_query_groups": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, random_mask()], ids=["causal", "given mask"])
def test_equals_the_stock_module(settings, mask, as_on_a_gpu, stock_calls) -> None:
    dtype = settings.get("params_dtype", torch.float32)
    inputs = draw_inputs(settings.get("num_query_groups", HEADS), dtype)
    ours = results(build(FusedDotProductAttention, **settings), mask, inputs)
    assert not stock_calls
    theirs = results(build(DotProductAttention, **settings), mask, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_keeps_no_scores(as_on_a_gpu) -> None:
    """No tensor that is kept for the backward pass has as many elements as the scores."""

    def largest_kept(attention: type[DotProductAttention]) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
            build(attention)(*draw_inputs(), None)
        return max(sizes)

    scores = BATCH * HEADS * SEQUENCE**2
    assert largest_kept(DotProductAttention) == scores
    assert largest_kept(FusedDotProductAttention) < scores


def test_dropout_is_drawn_in_training_only(as_on_a_gpu) -> None:
    attention = build(FusedDotProductAttention, attention_dropout=0.5)
    inputs = draw_inputs()
    with torch.no_grad():
        first, second = (attention(*inputs, None) for _ in range(2))
        attention.eval()
        kept = attention(*inputs, None)
    assert not torch.equal(first, second)
    torch.testing.assert_close(kept, build(DotProductAttention)(*inputs, None), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    "settings", [{"window_size": (4, 0)}, {"softmax_type": "off-by-one"}, {"mask_type": AttnMaskType.padding}], ids=str
)
def test_other_settings_are_left_to_the_stock_module(settings, as_on_a_gpu, stock_calls) -> None:
    inputs = draw_inputs()
    ours, theirs = (build(kind, **settings)(*inputs, None) for kind in (FusedDotProductAttention, DotProductAttention))
    assert len(stock_calls) == 2
    assert torch.equal(ours, theirs)


def test_fewer_queries_than_keys_without_a_mask_are_left_to_the_stock_module(as_on_a_gpu, stock_calls) -> None:
    """A query that is generated after the cached keys sees them all."""
    query, key, value = draw_inputs()
    build(FusedDotProductAttention)(query[-1:], key, value, None)
    assert len(stock_calls) == 1


@pytest.mark.skipif(not cpu.is_installed(), reason="needs a CPU")
def test_the_stock_module_computes_on_a_cpu(stock_calls) -> None:
    build(FusedDotProductAttention)(*draw_inputs(), None)
    assert len(stock_calls) == 1


def test_has_the_checkpoint_of_the_stock_module() -> None:
    assert not build(FusedDotProductAttention).state_dict()
