"""The transformers model routes as our Megatron router does, with the same load-balancing loss."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.router_cases import Case, cases
from support.small_moe import DEVICE, make_mask, reference_routing
from support.tiny_maskmoe import (
    NUM_LAYERS,
    VOCAB_SIZE,
    make_config,
    random_ids,
    random_mask,
)
from torch import Tensor

from maskmoe.checkpoint.read_routing_mask import buffers_of_routing_mask
from maskmoe.huggingface.modeling_maskmoe import (
    MaskMoERoutingMask,
    MaskMoESparseMoeBlock,
    MaskMoETopKRouter,
    load_balancing_loss,
    unpack_bits,
)
from maskmoe.transformer.router import MaskMoERouter

pytestmark = pytest.mark.usefixtures("one_rank")


# transformers wants as many experts from each group.
CASES = cases().filter(lambda case: case.groups is None or case.topk % case.groups[1] == 0)


def make_routers(case: Case, scaling_factor: float = 1.0) -> tuple[MaskMoETopKRouter, MaskMoERouter]:
    """Return our router and Megatron's router of a case, with the same random parameters."""
    num_groups, topk_group = case.groups or (None, None)
    theirs = case.router(moe_router_topk_scaling_factor=scaling_factor)
    theirs.weight.data.normal_(generator=torch.Generator(DEVICE).manual_seed(case.seed))
    config = make_config(
        case.mask,
        num_hidden_layers=2,
        hidden_size=8,
        num_experts_per_tok=case.topk,
        scoring_func=case.score_function,
        norm_topk_prob=not case.pre_softmax,
        use_expert_bias=theirs.enable_expert_bias,
        n_group=num_groups,
        topk_group=topk_group,
        routed_scaling_factor=scaling_factor,
        aux_loss_tokens=case.aux_loss_tokens,
    )
    ours = MaskMoETopKRouter(config)
    bias = {"e_score_correction_bias": theirs.expert_bias} if theirs.enable_expert_bias else {}
    ours.load_state_dict({"weight": theirs.weight.detach()} | bias)
    return ours.to(DEVICE), theirs


def draw_hidden(case: Case) -> Tensor:
    """Draw hidden states [sequence, batch, hidden]."""
    return torch.randn(*case.shape, 8, generator=torch.Generator().manual_seed(case.seed)).to(DEVICE)


# With large logits, scores of visible experts are rounded to 0.
@given(CASES, st.sampled_from([1.0, 2.5]), st.sampled_from([1.0, 100.0]))
@example(Case(0, 6, 1, (20, 2), "softmax_before", "all"), 1.0, 1.0)
@example(Case(0, 6, 2, (20, 2), "softmax_before", "all"), 1.0, 1.0)
@example(Case(1, 6, 6, (20, 2), "sigmoid_with_bias", "all"), 1.0, 1.0)
@example(Case(2, 6, 4, (20, 2), "sqrtsoftplus_with_bias", "all", groups=(3, 2)), 1.0, 1.0)
@example(Case(2, 6, 4, (20, 2), "softmax_after", "all", groups=(3, 2)), 1.0, 1.0)
@settings(derandomize=True)
def test_routes_as_the_megatron_router(case: Case, scaling_factor: float, scale: float) -> None:
    router, theirs = make_routers(case, scaling_factor)
    hidden = scale * draw_hidden(case)
    logits, weights, indices = router(hidden.flatten(0, 1), case.visible)
    with torch.no_grad():
        probs, routing_map = theirs(hidden, case.token_ids)
    ours = torch.zeros_like(probs).scatter_add(1, indices, weights.detach())
    # Both routers compute in float32, but add up in another order.
    torch.testing.assert_close(ours, probs, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.zeros_like(probs).scatter(1, indices, 1.0).bool(), routing_map)
    assert torch.equal(logits == float("-inf"), ~case.visible)
    assert case.visible.gather(1, indices).all()


@given(CASES)
@example(Case(3, 6, 2, (20, 2), "softmax_after", "all", has_padding=True))
@example(Case(3, 6, 2, (20, 2), "softmax_after", "routable", has_padding=True))
@settings(derandomize=True)
def test_load_balancing_loss_equals_the_reference(case: Case) -> None:
    router, _ = make_routers(case)
    logits, _, _ = router(draw_hidden(case).flatten(0, 1), case.visible)
    is_padding = None if case.is_padding is None else case.is_padding.flatten()
    expected = reference_routing(
        logits.detach(),
        case.visible,
        case.topk,
        score_function=case.score_function,
        aux_loss_tokens=case.aux_loss_tokens,
        is_padding=is_padding,
    ).load_balancing_loss
    loss = load_balancing_loss((logits, logits), None if is_padding is None else ~is_padding, router.config)
    torch.testing.assert_close(loss.double(), 2 * expected, rtol=1e-5, atol=1e-6)


def test_routes_in_float32_under_autocast() -> None:
    case = Case(0, 6, 2, (20, 2), "softmax_after", "all")
    (router, _), hidden = make_routers(case), draw_hidden(case).flatten(0, 1)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        under_autocast = router(hidden, case.visible)
    torch.testing.assert_close(under_autocast, router(hidden, case.visible), rtol=0, atol=0)


@pytest.mark.parametrize("tables", [1, NUM_LAYERS])
@pytest.mark.parametrize("num_experts", [3, 8, 13])
def test_lookup_gives_the_masks_visible_sets(num_experts, tables) -> None:
    rng = np.random.default_rng(num_experts)
    visible = rng.random((tables, VOCAB_SIZE, num_experts)) < 0.5
    visible[..., 0] |= ~visible.any(axis=-1)
    mask = make_mask(visible, NUM_LAYERS)
    module = MaskMoERoutingMask(make_config(mask))
    module.load_state_dict(buffers_of_routing_mask(mask))
    token_ids = random_ids(25)
    for table, bits in enumerate(module(token_ids)):
        assert torch.equal(unpack_bits(bits, num_experts), torch.from_numpy(visible[table])[token_ids])


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_invisible_experts_compute_nothing(implementation) -> None:
    """NaN weights of an invisible expert change nothing, even for tokens with V < k, and get no gradient."""
    mask = random_mask(1, 2)
    visible = torch.from_numpy(mask.visible_sets(0))
    config = make_config(mask, num_experts_per_tok=4)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MaskMoESparseMoeBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    token_ids = (~visible[:, 0]).nonzero().flatten()[None]  # the ids that do not see expert 0
    with torch.no_grad():
        block.experts.gate_up_proj[0] = float("nan")
        block.experts.down_proj[0] = float("nan")
    routing_mask = MaskMoERoutingMask(config)
    routing_mask.load_state_dict(buffers_of_routing_mask(mask))
    output = block(torch.randn(*token_ids.shape, config.hidden_size), routing_mask(token_ids.flatten()))
    output.sum().backward()
    assert output.isfinite().all()
    assert not block.experts.gate_up_proj.grad[0].any()
    assert block.experts.gate_up_proj.grad[1:].isfinite().all()
