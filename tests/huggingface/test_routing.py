"""The transformers model routes as our Megatron router does, with the same load-balancing loss; V = 1 is a look-up."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.small_moe import DEVICE, make_mask, make_router, reference_routing
from support.small_moe import make_config as make_megatron_config
from support.tiny_maskmoe import (
    NUM_EXPERTS,
    NUM_LAYERS,
    VOCAB_SIZE,
    make_config,
    make_model,
    random_ids,
    random_mask,
)
from torch import Tensor

from maskmoe.checkpoint.routing_mask import buffers_of_routing_mask
from maskmoe.huggingface.modeling_maskmoe import (
    MaskMoERoutingMask,
    MaskMoESparseMoeBlock,
    MaskMoETopKRouter,
    load_balancing_loss,
    unpack_bits,
)
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.transformer.token_ids import TokenIds

pytestmark = pytest.mark.usefixtures("one_rank")


@dataclass(frozen=True)
class Case:
    """Settings of a router, and tokens drawn for it from `seed`."""

    seed: int
    topk: int
    scoring_func: str = "softmax"
    normalised: bool = True
    has_bias: bool = False
    groups: tuple[int, int] | None = None
    scaling_factor: float = 1.0
    aux_loss_tokens: str = "all"
    has_padding: bool = False
    scale: float = 1.0

    @property
    def mask(self):
        return random_mask(seed=self.seed)

    @property
    def token_ids(self) -> Tensor:
        return random_ids(40, seed=self.seed)

    @property
    def visible(self) -> Tensor:
        """The experts that each token sees in the second layer, bool [tokens, experts]."""
        return torch.from_numpy(self.mask.visible_sets(1))[self.token_ids]

    @property
    def is_padding(self) -> Tensor | None:
        if not self.has_padding:
            return None
        return torch.from_numpy(np.random.default_rng(self.seed + 1).random(len(self.token_ids)) < 0.4)

    @property
    def hidden(self) -> Tensor:
        return self.normal(40, 8) * self.scale

    def normal(self, *shape: int) -> Tensor:
        """Draw numbers from the normal distribution; they depend on the shape and on the seed."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + len(shape) * shape[0]))

    @property
    def config(self):
        num_groups, topk_group = self.groups or (None, None)
        return make_config(
            self.mask,
            hidden_size=8,
            num_experts_per_tok=self.topk,
            scoring_func=self.scoring_func,
            norm_topk_prob=self.normalised,
            use_expert_bias=self.has_bias,
            n_group=num_groups,
            topk_group=topk_group,
            routed_scaling_factor=self.scaling_factor,
            aux_loss_tokens=self.aux_loss_tokens,
        )

    def router(self) -> MaskMoETopKRouter:
        router = MaskMoETopKRouter(self.config)
        router.load_state_dict({name: self.normal(*value.shape) for name, value in router.state_dict().items()})
        return router

    def megatron_router(self, ours: MaskMoETopKRouter):
        """Return Megatron's router with the weights of our router."""
        num_groups, topk_group = self.groups or (None, None)
        config = make_megatron_config(
            NUM_EXPERTS,
            self.topk,
            num_layers=NUM_LAYERS,
            moe_router_score_function=self.scoring_func,
            moe_router_enable_expert_bias=self.has_bias,
            moe_router_num_groups=num_groups,
            moe_router_group_topk=topk_group,
            moe_router_topk_scaling_factor=self.scaling_factor,
        )
        # The configuration refuses k = 1 with softmax after top-k, since the weight is constant. Set it afterwards.
        config.moe_router_pre_softmax = not self.normalised
        router = make_router(config, self.mask, layer_number=2)
        router.weight.data.copy_(ours.weight)
        if self.has_bias:
            router.expert_bias.copy_(ours.e_score_correction_bias)
        return router


@st.composite
def cases(draw, scales: tuple[float, ...] = (1.0,)) -> Case:
    scoring_func = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    groups = draw(st.sampled_from([None, (3, 2), (2, 1), (3, 3)]))
    topk = draw(st.sampled_from({None: [1, 2, 3, 6], (3, 2): [2, 4], (2, 1): [1, 2, 3], (3, 3): [3, 6]}[groups]))
    return Case(
        seed=draw(st.integers(0, 99)),
        topk=topk,
        scoring_func=scoring_func,
        # Megatron always normalises the other scores.
        normalised=draw(st.booleans()) if scoring_func == "softmax" else True,
        has_bias=scoring_func != "softmax" and draw(st.booleans()),
        groups=groups,
        scaling_factor=draw(st.sampled_from([1.0, 2.5])),
        aux_loss_tokens=draw(st.sampled_from(["all", "routable"])),
        has_padding=draw(st.booleans()),
        scale=draw(st.sampled_from(scales)),
    )


# With large logits, scores of visible experts are rounded to 0.
@given(cases(scales=(1.0, 100.0)))
@example(Case(seed=0, topk=1, normalised=False))
@example(Case(seed=0, topk=2, normalised=False))
@example(Case(seed=1, topk=6, scoring_func="sigmoid", has_bias=True))
@example(Case(seed=2, topk=4, scoring_func="sqrtsoftplus", has_bias=True, groups=(3, 2)))
@example(Case(seed=2, topk=4, groups=(3, 2)))
@settings(max_examples=60, derandomize=True)
def test_routes_as_the_megatron_router(case: Case) -> None:
    router = case.router()
    logits, weights, indices = router(case.hidden, case.visible)
    with torch.no_grad():
        probs, routing_map = case.megatron_router(router)(
            case.hidden.unsqueeze(1).to(DEVICE), TokenIds(case.token_ids.unsqueeze(1).to(DEVICE))
        )
    ours = torch.zeros(40, NUM_EXPERTS).scatter_add(1, indices, weights.detach())
    # Both routers compute in float32, but add up in another order.
    torch.testing.assert_close(ours, probs.cpu(), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.zeros(40, NUM_EXPERTS).scatter(1, indices, 1.0).bool(), routing_map.cpu())
    assert torch.equal(logits == float("-inf"), ~case.visible)
    assert case.visible.gather(1, indices).all()


@given(cases())
@example(Case(seed=3, topk=2, has_padding=True))
@example(Case(seed=3, topk=2, aux_loss_tokens="routable", has_padding=True))
@settings(max_examples=60, derandomize=True)
def test_load_balancing_loss_equals_the_reference(case: Case) -> None:
    logits, _, _ = case.router()(case.hidden, case.visible)
    real = None if case.is_padding is None else ~case.is_padding
    expected = reference_routing(
        logits.detach(),
        case.visible,
        case.topk,
        score_function=case.scoring_func,
        aux_loss_tokens=case.aux_loss_tokens,
        is_padding=case.is_padding,
    ).load_balancing_loss
    loss = load_balancing_loss((logits, logits), real, case.config)
    torch.testing.assert_close(loss.double(), 2 * expected, rtol=1e-5, atol=1e-6)


def test_routes_in_float32_under_autocast() -> None:
    case = Case(seed=0, topk=2)
    router = case.router()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = router(case.hidden, case.visible)
    for actual, expected in zip(under_autocast, router(case.hidden, case.visible), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("normalised", [True, False])
def test_one_visible_expert_is_a_table_lookup(topk, normalised) -> None:
    mask = build_routing_mask(MaskRecipe.from_preset("hash", NUM_EXPERTS, NUM_LAYERS, seed=4), vocab_size=VOCAB_SIZE)
    model = make_model(mask, num_experts_per_tok=topk, norm_topk_prob=normalised)
    token_ids = torch.arange(VOCAB_SIZE).view(4, -1)
    seen = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda block, inputs, output: seen.append((block, inputs[0], output)))
    model(token_ids).logits.square().sum().backward()
    assert len(seen) == NUM_LAYERS
    for table, (block, hidden, output) in zip(mask.row_of_id, seen, strict=True):
        expert = torch.from_numpy(table.astype(np.int64))[token_ids]  # [batch, sequence]
        gate, up = torch.einsum("bth,btfh->btf", hidden, block.experts.gate_up_proj[expert]).chunk(2, dim=-1)
        expected = torch.einsum("btf,bthf->bth", torch.nn.functional.silu(gate) * up, block.experts.down_proj[expert])
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)  # additions are in another order
        assert not block.gate.weight.grad.any()


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
