"""MaskMoE's specs are Megatron's specs with some modules replaced, and differ in nothing else."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from support.small_moe import make_config, make_mask, make_visible_experts, random_visible_sets

from maskmoe.transformer.layer_specs import MaskMoEHybridStack, get_maskmoe_decoder_block_spec
from maskmoe.transformer.router import MaskMoERouter

PATTERNS = [1, 2, [0, 1, 1, 0], [1, 0, 0, 0]]


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths and leaves of a spec."""
    if isinstance(node, partial):
        yield from leaves(node.func, f"{path}.func")
        yield from leaves(node.args, f"{path}.args")
        node = node.keywords
    if isinstance(node, dict):
        for name, child in node.items():
            yield from leaves(child, f"{path}.{name}")
    elif isinstance(node, list | tuple):
        for index, child in enumerate(node):
            yield from leaves(child, f"{path}[{index}]")
    elif is_dataclass(node) and not isinstance(node, type):
        for field in fields(node):
            yield from leaves(getattr(node, field.name), f"{path}.{field.name}")
    else:
        yield path, node


@pytest.mark.parametrize("settings", [{"qk_l2_norm": True}, {"moe_shared_expert_intermediate_size": 10}], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_moe_layer_and_norm_is_replaced_and_nothing_is_added(pattern: int | list[int], settings: dict) -> None:
    config = make_config(num_layers=4, moe_layer_freq=pattern, qk_layernorm=True, **settings)
    visible_experts = make_visible_experts(config, make_mask(random_visible_sets(0, 4, 9, 4)))
    stock = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    theirs, ours = (
        dict(leaves(stock)),
        dict(leaves(get_maskmoe_decoder_block_spec(config, visible_experts, "routable"))),
    )
    # The stock router is a field's default in some versions and explicit in others; ours is a partial with arguments.
    assert {path for path in theirs if "router" not in path} == {path for path in ours if "router" not in path}
    assert all(ours[path] == theirs[path] for path in theirs if "router" not in path and not callable(theirs[path]))
    assert not {MoELayer, TopKRouter, WrappedTorchNorm, DotProductAttention} & {*ours.values()}
    moe_layers = config.moe_layer_freq if isinstance(pattern, list) else [int(i % pattern == 0) for i in range(4)]
    assert list(ours.values()).count(MaskMoERouter) == sum(moe_layers)
    routers = [value for path, value in ours.items() if path.endswith("router.aux_loss_tokens")]
    assert routers == ["routable"] * sum(moe_layers)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_hybrid_stack_draws_from_the_generator_of_the_tensor_parallel_rank(sequence_parallel, monkeypatch) -> None:
    """Ranks of sequence parallelism have different tokens, so their dropout must differ, as in `TransformerBlock`."""
    stack = MaskMoEHybridStack.__new__(MaskMoEHybridStack)
    torch.nn.Module.__init__(stack)
    stack.config = make_config(sequence_parallel=sequence_parallel, tensor_model_parallel_size=2)
    monkeypatch.setattr(HybridStack, "forward", lambda self: torch.rand(4))
    model_parallel_cuda_manual_seed(1)
    drawn = stack()
    model_parallel_cuda_manual_seed(1)
    of_all_ranks = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        of_this_rank = torch.rand(4)
    assert not torch.equal(of_all_ranks, of_this_rank)
    assert torch.equal(drawn, of_this_rank if sequence_parallel else of_all_ranks)
