"""Core attention by torch's fused kernels against attention in plain torch, also on context-parallel ranks."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.utils import get_batch_on_this_cp_rank
from support import small_moe as moe
from support.launchers import RunRanks
from support.small_moe import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maskmoe.training.model.batch import weight_of_rank
from maskmoe.transformer.torch_modules.attention import TorchDotProductAttention

SEQUENCE, BATCH, HEADS, CHANNELS = 24, 2, 4, 8
CAUSAL, NO_MASK, PADDING = AttnMaskType.causal, AttnMaskType.no_mask, AttnMaskType.padding


def build(
    kind: type[DotProductAttention] = TorchDotProductAttention,
    mask_type: AttnMaskType = CAUSAL,
    layer_number: int = 1,
    softmax_scale: float | None = None,
    **settings: Any,
) -> DotProductAttention:
    """Build a module of core attention."""
    sizes = {"num_attention_heads": HEADS, "hidden_size": HEADS * CHANNELS, "num_layers": 4}
    config = moe.make_config(**sizes | settings)
    groups = moe.process_groups()
    config.context_parallel_size = groups.cp.size()
    return kind(config, layer_number, mask_type, "self", pg_collection=groups, softmax_scale=softmax_scale)


def draw_inputs(
    groups: int = HEADS, dtype: torch.dtype = torch.float32, value_channels: int = CHANNELS, sequence: int = SEQUENCE
) -> list[Tensor]:
    """Draw queries, keys and values [sequence, batch, heads, channels]."""
    torch.manual_seed(0)
    shapes = ((HEADS, CHANNELS), (groups, CHANNELS), (groups, value_channels))
    return [torch.randn(sequence, BATCH, *shape, device=DEVICE, dtype=dtype, requires_grad=True) for shape in shapes]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """Compute attention with all scores, in fp32."""
    query, key, value = (tensor.float() for tensor in (query, key, value))
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[2], dim=2) for tensor in (key, value))
    scores = (torch.einsum("qbhc,kbhc->bhqk", query, key) * scale).masked_fill(hidden, float("-inf"))
    probs = scores.softmax(dim=-1).nan_to_num()  # a query that sees no key has output zero
    return torch.einsum("bhqk,kbhc->qbhc", probs, value).flatten(2)


def later_keys(queries: int = SEQUENCE, keys: int = SEQUENCE) -> Tensor:
    """Return bool [queries, keys], True for keys after the query; the last query is at the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=DEVICE).triu(1 + keys - queries)


def random_mask() -> Tensor:
    """Return pairs that must not see each other, bool [batch, 1, queries, keys]."""
    torch.manual_seed(2)
    hidden = torch.rand(BATCH, 1, SEQUENCE, SEQUENCE, device=DEVICE) < 0.3
    return (hidden | later_keys()) & ~torch.eye(SEQUENCE, dtype=torch.bool, device=DEVICE)


def padding_mask() -> Tensor:
    """Return a mask of padded keys, bool [batch, 1, 1, keys]."""
    lengths = torch.tensor([SEQUENCE - 5, SEQUENCE], device=DEVICE)
    return (torch.arange(SEQUENCE, device=DEVICE) >= lengths[:, None]).view(BATCH, 1, 1, SEQUENCE)


def outside(left: int, right: int) -> Tensor:
    """Return bool [queries, keys], True for keys outside a window around the query."""
    distance = torch.arange(SEQUENCE, device=DEVICE) - torch.arange(SEQUENCE, device=DEVICE)[:, None]
    return (distance < -left) | (distance > right)


EVERYTHING = torch.zeros(SEQUENCE, SEQUENCE, dtype=torch.bool, device=DEVICE)
FIRST_QUERY_SEES_NOTHING = later_keys()[None, None].index_fill(2, torch.tensor([0], device=DEVICE), True)
# The type of mask, the window, the mask that is given, and the pairs that must not see each other.
MASKS = {
    "causal": (CAUSAL, None, None, later_keys()),
    "given mask": (CAUSAL, None, random_mask(), random_mask()),
    "a query that sees no key": (CAUSAL, None, FIRST_QUERY_SEES_NOTHING, FIRST_QUERY_SEES_NOTHING),
    "no mask": (NO_MASK, None, None, EVERYTHING),
    "padding": (PADDING, None, padding_mask(), padding_mask()),
    "padding, causal": (AttnMaskType.padding_causal, None, padding_mask(), padding_mask() | later_keys()),
    "own token": (CAUSAL, (0, 0), None, outside(0, 0)),
    "window": (CAUSAL, (9, 0), None, outside(9, 0)),
    "window of all": (CAUSAL, (SEQUENCE, 0), None, later_keys()),
    "window, given mask": (CAUSAL, (4, 0), random_mask(), random_mask() | outside(4, 0)),
    "causal window with a right side": (CAUSAL, (4, 3), None, outside(4, 0)),
    "right side": (NO_MASK, (-1, 3), None, outside(SEQUENCE, 3)),
    "left side": (NO_MASK, (4, -1), None, outside(4, SEQUENCE)),
    "padding, both sides": (PADDING, (4, 3), padding_mask(), padding_mask() | outside(4, 3)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries, scale": {"num_query_groups": 2, "softmax_scale": 0.7},
    "layer scaling": {"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True, "layer_number": 3},
    "wide values": {"value_channels": 12},
    "narrow values, grouped queries": {"num_query_groups": 2, "value_channels": 4},
    "bf16": {"num_query_groups": 2, "bf16": True, "params_dtype": torch.bfloat16},
}


def part_of_rank(tensor: Tensor, name: str = "tokens") -> Tensor:
    """Return the part that Megatron gives to this rank of tokens [sequence, ...], or of a mask by name."""
    batch = {name: tensor if name == "attention_mask" else tensor.transpose(0, 1), "cu_seqlens": None}
    part = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=moe.process_groups().cp)[name]
    return part if name == "attention_mask" else part.transpose(0, 1)


def difference(settings_name: str, mask_name: str) -> float:
    """Return the largest difference of this rank's outputs and gradients from attention in plain torch.

    The differences relate to the largest value, at least 1.
    """
    mask_type, window, given, hidden = MASKS[mask_name]
    settings = dict(SETTINGS[settings_name])
    dtype, value_channels = settings.get("params_dtype", torch.float32), settings.pop("value_channels", CHANNELS)
    attention = build(mask_type=mask_type, window_size=window, **settings)
    whole = draw_inputs(settings.get("num_query_groups", HEADS), dtype, value_channels)
    expected = plain_attention(*whole, hidden, settings.get("softmax_scale", CHANNELS**-0.5))
    gradient = torch.randn_like(expected).to(dtype)
    expected_grads = torch.autograd.grad(expected, whole, gradient.float())

    parts = [part_of_rank(tensor.detach()).clone().requires_grad_() for tensor in whole]
    if given is not None and attention.cp_group.size() > 1:
        given = part_of_rank(given.expand(-1, -1, SEQUENCE, -1), "attention_mask")
    output = attention(*parts, given)
    grads = torch.autograd.grad(output, parts, part_of_rank(gradient))
    pairs = [(output, part_of_rank(expected))]
    pairs += [(grad, part_of_rank(whole_grad)) for grad, whole_grad in zip(grads, expected_grads, strict=True)]
    return max(
        ((one.float() - other.float()).abs() / other.float().abs().clamp(min=1)).max().item() for one, other in pairs
    )


# Sums are added in another order. In bf16, probabilities are rounded, too.
FP32_TOLERANCE, BF16_TOLERANCE = 5e-6, 4e-2


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_plain_torch(settings: str, mask: str) -> None:
    """Output and gradients."""
    assert difference(settings, mask) < (BF16_TOLERANCE if "bf16" in settings else FP32_TOLERANCE)


def difference_of_loss() -> float:
    """Return the difference of the mean loss from one rank's; the ranks have unequal numbers of tokens."""
    torch.manual_seed(0)
    group = moe.process_groups().cp
    mask, losses = (torch.rand(SEQUENCE, BATCH) < 0.5).float(), torch.rand(SEQUENCE, BATCH)
    mask_part, losses_part = part_of_rank(mask), part_of_rank(losses)
    num_tokens = mask_part.sum().int()
    # As Megatron does, divide by the rank's tokens and average over the ranks.
    loss = (losses_part * mask_part).sum() * weight_of_rank(num_tokens, group) / num_tokens / group.size()
    torch.distributed.all_reduce(loss, group=group)
    return abs(loss - (losses * mask).sum() / mask.sum()).item()


def differences_of_rank() -> dict[str, float]:
    """Return the differences of attention, and of the loss, by case."""
    moe.initialize_parallelism(context_parallel_size=torch.distributed.get_world_size())
    settings = [name for name in SETTINGS if "bf16" not in name]
    found = {f"{name}, {mask}": difference(name, mask) for name in settings for mask in MASKS}
    return found | {"loss": difference_of_loss()}


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_context_parallel_ranks_equal_plain_torch(num_ranks: int, run_ranks: RunRanks, tmp_path: Any) -> None:
    """Ranks hold chunks in Megatron's zigzag order."""
    for differences in run_ranks(differences_of_rank, tmp_path, world_size=num_ranks):
        assert max(differences.values()) < FP32_TOLERANCE, differences


@pytest.mark.parametrize("queries", [1, 5])
def test_fewer_queries_than_keys_are_the_last_ones(queries: int) -> None:
    """Queries that are generated after cached keys see these keys, and each other up to their own position."""
    query, key, value = draw_inputs()
    attention = build()
    last = attention(query[-queries:], key, value, None)
    torch.testing.assert_close(last, attention(query, key, value, None)[-queries:], rtol=2e-6, atol=2e-6)


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
        attention(*inputs, mask).sum().backward()
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
        ({"window_size": (31, 0)}, LONG * LONG),
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
