"""Core attention by torch's fused kernels against Megatron-Core's `DotProductAttention`, and against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from support.ranks.context_parallel_ranks import deviations_of_rank
from support.small_moe import DEVICE, make_config, process_groups
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskmoe.transformer.torch_modules import attention as attention_module
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention

SEQUENCE, BATCH, HEADS, CHANNELS = 24, 2, 4, 8
# The modules add in another order. In bf16, the stock module also rounds the scores and the probabilities.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def build(
    attention: type[DotProductAttention],
    mask_type: AttnMaskType = AttnMaskType.causal,
    layer_number: int = 1,
    softmax_scale: float | None = None,
    offset: list[float] | None = None,
    **settings: Any,
) -> DotProductAttention:
    """Build a module of core attention; `offset` is the softmax offset of each head."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * CHANNELS, "num_layers": 4}
    config = make_config(**(sizes | settings))
    module = attention(
        config, layer_number, mask_type, "self", softmax_scale=softmax_scale, pg_collection=process_groups()
    )
    if offset is not None:
        module.softmax_offset.data.copy_(torch.tensor(offset))
    return module


def draw_inputs(
    groups: int = HEADS, dtype: torch.dtype = torch.float32, value_channels: int = CHANNELS, queries: int = SEQUENCE
) -> list[Tensor]:
    """Draw queries, keys and values."""
    torch.manual_seed(0)
    shapes = [
        (queries, BATCH, HEADS, CHANNELS),
        (SEQUENCE, BATCH, groups, CHANNELS),
        (SEQUENCE, BATCH, groups, value_channels),
    ]
    return [torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def results(attention: Callable[..., Tensor], mask: Tensor | None, inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of queries, keys, values and parameters."""
    output = attention(*inputs, mask)
    torch.manual_seed(1)
    parameters = list(attention.parameters()) if isinstance(attention, torch.nn.Module) else []
    return [output, *torch.autograd.grad(output, [*inputs, *parameters], torch.randn_like(output))]


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def later_keys(queries: int = SEQUENCE, keys: int = SEQUENCE) -> Tensor:
    """Return bool [queries, keys], True for keys after the query; the last query is at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).triu(1 + keys - queries)


def random_mask() -> Tensor:
    """Return a causal mask with further pairs that must not see each other, bool [batch, 1, queries, keys]."""
    torch.manual_seed(2)
    hidden = torch.rand(BATCH, 1, SEQUENCE, SEQUENCE, device=DEVICE) < 0.3
    return (hidden | later_keys()) & ~torch.eye(SEQUENCE, dtype=torch.bool, device=DEVICE)


def padding_mask() -> Tensor:
    """Return a mask of padded keys, bool [batch, 1, 1, keys]."""
    lengths = torch.tensor([SEQUENCE - 5, SEQUENCE], device=DEVICE)
    return (torch.arange(SEQUENCE, device=DEVICE) >= lengths[:, None]).view(BATCH, 1, 1, SEQUENCE)


def plain_attention(hidden: Tensor | None) -> Callable[..., Tensor]:
    """Return attention in plain torch, with repeated keys and values and all scores, for a mask that broadcasts."""

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Any) -> Tensor:
        key, value = (tensor.repeat_interleave(HEADS // tensor.shape[2], dim=2) for tensor in (key, value))
        scores = torch.einsum("qbhc,kbhc->bhqk", query, key) / CHANNELS**0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        return torch.einsum("bhqk,kbhc->qbhc", scores.softmax(dim=-1), value).flatten(2)

    return attend


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_query_groups": 2},
        {"softmax_scale": 0.7},
        {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "layer_number": 3},
        {"softmax_type": "off-by-one"},
        {"softmax_type": "learnable", "offset": [-1.0, 0.0, 1.0, 3.0], "num_query_groups": 2, "softmax_scale": 0.7},
        {"bf16": True, "params_dtype": torch.bfloat16, "num_query_groups": 2},
        {"bf16": True, "params_dtype": torch.bfloat16, "softmax_type": "learnable", "offset": [-1.0, 0.0, 1.0, 3.0]},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, random_mask()], ids=["causal", "given mask"])
def test_equals_the_stock_module(settings, mask) -> None:
    dtype = settings.get("params_dtype", torch.float32)
    inputs = draw_inputs(settings.get("num_query_groups", HEADS), dtype)
    ours, theirs = (
        results(build(kind, **settings), mask, inputs) for kind in (TorchDotProductAttention, DotProductAttention)
    )
    assert_close(ours, theirs, dtype)


@pytest.mark.parametrize("mask_type", [AttnMaskType.padding, AttnMaskType.no_mask, AttnMaskType.arbitrary])
@pytest.mark.parametrize("mask", [None, padding_mask(), random_mask()], ids=["none", "padding", "arbitrary"])
def test_other_mask_types_equal_the_stock_module(mask_type, mask) -> None:
    ours, theirs = (
        results(build(kind, mask_type), mask, draw_inputs()) for kind in (TorchDotProductAttention, DotProductAttention)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize("block", [1, 256])
@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one"])
@pytest.mark.parametrize("window", [(0, 0), (4, 0), (9, 0), (SEQUENCE, 0)], ids=str)
def test_windows_equal_the_stock_module(window, softmax_type, block, monkeypatch) -> None:
    """Also if the queries are more than one block."""
    monkeypatch.setattr(attention_module, "SHORTEST_BLOCK", block)
    settings = {"window_size": window, "softmax_type": softmax_type}
    ours, theirs = (
        results(build(kind, **settings), None, draw_inputs())
        for kind in (TorchDotProductAttention, DotProductAttention)
    )
    assert_close(ours, theirs)


def window(left: int, right: int) -> Tensor:
    """Return bool [queries, keys], True for keys outside a window around the query."""
    distance = torch.arange(SEQUENCE, device=DEVICE) - torch.arange(SEQUENCE, device=DEVICE)[:, None]
    return (distance < -left) | (distance > right)


@pytest.mark.parametrize(
    ("mask_type", "size", "mask", "hidden"),
    [
        (AttnMaskType.padding_causal, None, padding_mask(), padding_mask() | later_keys()),
        (AttnMaskType.causal_bottom_right, None, None, later_keys()),
        (AttnMaskType.causal, (4, 0), random_mask(), random_mask() | window(4, 0)),
        (AttnMaskType.causal, (4, 3), None, window(4, 0)),
        (AttnMaskType.causal, (-1, 0), None, later_keys()),
        (AttnMaskType.no_mask, (4, 3), None, window(4, 3)),
        (AttnMaskType.no_mask, (-1, 3), None, window(SEQUENCE, 3)),
        (AttnMaskType.no_mask, (4, -1), None, window(4, SEQUENCE)),
        (AttnMaskType.padding, (4, 3), padding_mask(), padding_mask() | window(4, 3)),
    ],
    ids=lambda value: "mask" if isinstance(value, Tensor) else str(value),
)
def test_masks_that_the_stock_module_lacks_equal_plain_torch(mask_type, size, mask, hidden, monkeypatch) -> None:
    monkeypatch.setattr(attention_module, "SHORTEST_BLOCK", 1)
    # Queries at padding that see no key are left out: plain torch has no number for them.
    sees_a_key = ~hidden.expand(BATCH, 1, SEQUENCE, SEQUENCE).all(dim=-1).squeeze(1).t()  # [queries, batch]
    ours, theirs = (
        results(lambda *inputs, attend=attend: attend(*inputs)[sees_a_key], mask, draw_inputs(groups=2))
        for attend in (
            build(TorchDotProductAttention, mask_type, window_size=size, num_query_groups=2),
            plain_attention(hidden & ~hidden.all(dim=-1, keepdim=True)),
        )
    )
    assert_close(ours, theirs)


def test_a_query_that_sees_no_key_has_output_zero() -> None:
    mask = later_keys()[None, None].clone()
    mask[..., 3, :] = True
    output, *gradients = results(build(TorchDotProductAttention), mask, draw_inputs())
    assert not output[3].any()
    assert all(tensor.isfinite().all() for tensor in (output, *gradients))


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("softmax_type", ["vanilla", "off-by-one"])
def test_fewer_queries_than_keys_are_the_last_ones(queries, softmax_type) -> None:
    """Queries that are generated after cached keys see these keys, and each other up to their own position."""
    query, key, value = draw_inputs()
    attention = build(TorchDotProductAttention, softmax_type=softmax_type)
    last = attention(query[-queries:], key, value, None)
    torch.testing.assert_close(last, attention(query, key, value, None)[-queries:], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value_channels", [4, 12])
@pytest.mark.parametrize("mask", [None, random_mask()], ids=["causal", "given mask"])
def test_values_have_a_width_of_their_own(value_channels, mask) -> None:
    inputs = draw_inputs(value_channels=value_channels)
    ours = results(build(TorchDotProductAttention), mask, inputs)
    theirs = results(plain_attention(later_keys() if mask is None else mask), mask, inputs)
    assert ours[0].shape == (SEQUENCE, BATCH, HEADS * value_channels)
    assert_close(ours, theirs)


def test_values_of_another_width_with_an_offset() -> None:
    """An offset of zero is one more key with score zero and value zero."""
    query, key, value = inputs = draw_inputs(value_channels=12)
    ours = results(build(TorchDotProductAttention, softmax_type="off-by-one"), None, inputs)

    def with_zero_key(query: Tensor, key: Tensor, value: Tensor, _: Any) -> Tensor:
        key, value = (torch.cat([torch.zeros_like(tensor[:1]), tensor]) for tensor in (key, value))
        return plain_attention(later_keys(SEQUENCE, SEQUENCE + 1))(query, key, value, None)

    assert_close(ours, results(with_zero_key, None, [query, key, value]))


def test_the_scale_follows_the_channels_of_the_keys() -> None:
    settings: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal, "attention_type": "self"}
    config = make_config(num_attention_heads=HEADS, hidden_size=HEADS * CHANNELS)
    attention = TorchDotProductAttention(config, 1, k_channels=2 * CHANNELS, v_channels=CHANNELS, **settings)
    inputs = [tensor.repeat(1, 1, 1, 2) for tensor in draw_inputs()]
    equal = build(TorchDotProductAttention, softmax_scale=(2 * CHANNELS) ** -0.5)
    assert torch.equal(attention(*inputs, None), equal(*inputs, None))


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, Tensor):
                self.elements = max(self.elements, output.numel())
        return outputs


def largest_tensor(kind: type[DotProductAttention], mask: Tensor | None, inputs: list[Tensor], **settings: Any) -> int:
    """Return the number of elements of the largest tensor of a forward and backward pass."""
    attention = build(kind, **settings)
    with LargestTensor() as largest:
        results(attention, mask, inputs)
    return largest.elements


# Longer than the widened inputs: `2 * HEADS * CHANNELS` elements a token are less than `HEADS * LONG`.
LONG = 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, LONG * HEADS * CHANNELS),
        ({"num_query_groups": 2}, LONG * HEADS * CHANNELS),
        ({"value_channels": 4}, LONG * HEADS * CHANNELS),
        ({"softmax_type": "off-by-one"}, (LONG + 1) * HEADS * 2 * CHANNELS),
        # A block of 256 queries sees 31 keys more than its own.
        ({"window_size": (31, 0)}, 256 * 287),
        ({"window_size": (31, 0), "num_query_groups": 2, "softmax_type": "off-by-one"}, 256 * 288),
        ({"given mask": True}, LONG * LONG),
    ],
    ids=str,
)
def test_no_tensor_is_as_large_as_the_scores(settings, bound, dtype) -> None:
    """The largest tensor grows with the sequence, or is a mask that all heads share."""
    settings = settings | {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    mask = later_keys(LONG, LONG)[None, None] if settings.pop("given mask", False) else None
    value_channels = settings.pop("value_channels", CHANNELS)
    groups = settings.get("num_query_groups", HEADS)
    torch.manual_seed(0)
    inputs = [
        torch.randn(LONG, 1, heads, channels, device=DEVICE, dtype=dtype, requires_grad=True)
        for heads, channels in ((HEADS, CHANNELS), (groups, CHANNELS), (groups, value_channels))
    ]
    assert largest_tensor(TorchDotProductAttention, mask, inputs, **settings) <= bound < HEADS * LONG * LONG
    if value_channels == CHANNELS:
        assert largest_tensor(DotProductAttention, mask, inputs, **settings) >= HEADS * LONG * LONG


def test_dropout_is_drawn_in_training_only() -> None:
    attention = build(TorchDotProductAttention, attention_dropout=0.5)
    inputs = draw_inputs()
    with torch.no_grad():
        first, second = (attention(*inputs, None) for _ in range(2))
        attention.eval()
        kept = attention(*inputs, None)
    assert not torch.equal(first, second)
    torch.testing.assert_close(kept, build(DotProductAttention)(*inputs, None), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dropout_draws_from_the_generator_of_the_stock_module(sequence_parallel) -> None:
    """Without sequence parallelism, each tensor-parallel rank has a generator of its own."""

    def moves_generator_of_rank(kind: type[DotProductAttention]) -> bool:
        attention = build(kind, attention_dropout=0.5)
        attention.config.sequence_parallel = sequence_parallel
        before = get_cuda_rng_tracker().get_states()["model-parallel-rng"].clone()
        attention(*draw_inputs(), None)
        return not torch.equal(before, get_cuda_rng_tracker().get_states()["model-parallel-rng"])

    assert moves_generator_of_rank(TorchDotProductAttention) == moves_generator_of_rank(DotProductAttention)
    assert moves_generator_of_rank(TorchDotProductAttention) == (not sequence_parallel)


def test_refuses_a_bias() -> None:
    attention, inputs = build(TorchDotProductAttention), draw_inputs()
    with pytest.raises(NotImplementedError, match="no bias"):
        attention(*inputs, None, attention_bias=torch.zeros(1))


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_context_parallel_ranks_equal_one_rank(num_ranks, run_ranks, tmp_path) -> None:
    """Outputs and gradients of ranks that hold chunks in Megatron's zigzag order; the sums add up in another order."""
    for deviations in run_ranks(deviations_of_rank, tmp_path, world_size=num_ranks):
        assert max(deviations.values()) < 5e-6, deviations
