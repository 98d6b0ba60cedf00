"""The router: V = N against `TopKRouter`, V = 1 against a table lookup, all else against a plain reference."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from support import small_moe as moe
from support.datasets import frequency_of
from support.router_cases import ALL_BALANCING_LOSSES, LOSSES, Case, cases
from support.small_moe import DEVICE
from torch import Tensor

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

GROUPS = {"moe_router_num_groups": 3, "moe_router_group_topk": 2}
LOSS_SCALE = 0.5


@pytest.fixture(autouse=True, scope="module")
def _loss_scale():
    """Set the scale of the auxiliary losses' gradients, as the pipeline schedule does for each micro-batch."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(LOSS_SCALE, device=DEVICE))


@dataclass(frozen=True)
class Routed:
    """Outputs and gradients of a router."""

    probs: Tensor
    routing_map: Tensor
    input_grad: Tensor
    weight_grad: Tensor
    losses: dict[str, Tensor]
    local_tokens_per_expert: Tensor | None


def route(router: TopKRouter, hidden: Tensor, *per_token: TokenIds | Tensor) -> Routed:
    hidden = hidden.clone().requires_grad_()
    moe.take_metrics()
    probs, routing_map = router(hidden, *per_token)
    generator = torch.Generator().manual_seed(3)
    probs.backward(torch.randn(probs.shape, generator=generator).to(probs))
    return Routed(
        probs.detach(),
        routing_map,
        hidden.grad,
        router.weight.grad,
        moe.take_metrics(),
        router.local_tokens_per_expert,
    )


def all_visible_mask(kind: str, vocab_size: int, num_experts: int):
    """Build a mask in which the first half of the vocabulary sees every expert."""
    if kind == "smoe":
        return build_routing_mask(MaskRecipe.from_preset("smoe", num_experts, 1), vocab_size=vocab_size)
    recipe = MaskRecipe(num_experts, 1, "uniform", frequent_mass=0.99, frequent_visible_experts=num_experts)
    mask = build_routing_mask(recipe, frequency=frequency_of(np.repeat([1000, 1], vocab_size // 2)))
    assert mask.min_visible == 1
    return mask


def make_stock_pair(config, mask_kind: str, aux_loss_tokens="all") -> tuple[MaskMoERouter, TopKRouter]:
    """Build our router, with a mask that hides nothing, and the stock router, with the same random weights."""
    mask = all_visible_mask(mask_kind, vocab_size=20, num_experts=config.num_moe_experts)
    ours = moe.make_router(config, mask, aux_loss_tokens=aux_loss_tokens)
    stock = TopKRouter(config, moe.process_groups()).to(DEVICE)
    stock.set_layer_number(1)
    torch.manual_seed(1)
    with torch.no_grad():
        stock.weight.copy_(torch.randn_like(stock.weight))
        if stock.expert_bias is not None:
            stock.expert_bias.copy_(torch.randn_like(stock.expert_bias))
    ours.load_state_dict(stock.state_dict())
    return ours, stock


SETTINGS = [
    {"topk": 1, "moe_router_pre_softmax": True},
    {"topk": 2, "params_dtype": torch.bfloat16, "bf16": True},
    {"moe_aux_loss_coeff": 0.0, "moe_z_loss_coeff": None},
    {"moe_router_score_function": "sigmoid"},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "topk": 1},
    {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
    {"moe_router_dtype": None},
    {"moe_router_dtype": "fp64"},
    {"calculate_per_token_loss": True},
    {"add_bias_linear": True},
    {"num_experts": 9, "topk": 9},
    {"moe_router_load_balancing_type": "none"},
    {"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": [1e-2]},
    {"moe_router_load_balancing_type": "seq_aux_loss"},
    {"moe_router_load_balancing_type": "seq_aux_loss", "calculate_per_token_loss": True},
    {"moe_router_load_balancing_type": "global_aux_loss"},
    {"moe_router_load_balancing_type": "global_aux_loss", "calculate_per_token_loss": True},
    ALL_BALANCING_LOSSES,
    ALL_BALANCING_LOSSES | {"moe_router_score_function": "sigmoid"},
    {"moe_router_score_function": "sqrtsoftplus"},
    {"moe_router_score_function": "sqrtsoftplus", "moe_router_enable_expert_bias": True},
    GROUPS,
    GROUPS | {"moe_router_pre_softmax": True},
    GROUPS | {"moe_router_score_function": "sigmoid"},
    GROUPS | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    GROUPS | {"moe_router_group_topk": 3, "topk": 3},
    GROUPS | {"moe_router_group_topk": 1, "topk": 4},
    {"moe_expert_capacity_factor": 1.0},
    {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    {"moe_expert_capacity_factor": 1.0, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    {"aux_loss_tokens": "routable"},
    ALL_BALANCING_LOSSES | {"aux_loss_tokens": "routable"},
    {"shape": (4097, 3)},  # the squared number of tokens has more digits than float32
]
"""Overrides of the configuration, of the tokens that losses count, and of the shape [sequence, batch] of the tokens."""


@pytest.mark.parametrize("mask_kind", ["smoe", "frequent"])
@pytest.mark.parametrize("overrides", SETTINGS, ids=str)
def test_all_visible_equals_stock_in_every_setting(overrides: dict, mask_kind: str) -> None:
    settings = {"num_experts": 12, "topk": 4, "shape": (5, 3), "aux_loss_tokens": "all"} | LOSSES | overrides
    shape, aux_loss_tokens = settings.pop("shape"), settings.pop("aux_loss_tokens")
    config = moe.make_config(**settings)
    ours, stock = make_stock_pair(config, mask_kind, aux_loss_tokens)
    for _ in range(3):
        hidden = torch.randn(*shape, config.hidden_size, device=DEVICE, dtype=config.params_dtype)
        token_ids = torch.randint(0, 10, shape, device=DEVICE)
        found, expected = route(ours, hidden, TokenIds(token_ids)), route(stock, hidden)
        torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)
    with torch.no_grad():
        assert all(map(torch.equal, ours.eval()(hidden, TokenIds(token_ids)), stock.eval()(hidden)))


@pytest.mark.parametrize("per_token_loss", [False, True])
@pytest.mark.parametrize("mask_kind", ["smoe", "frequent"])
def test_all_visible_equals_stock_with_padding(mask_kind, per_token_loss) -> None:
    """Compare weights and map bit for bit, losses approximately: the stock router squares token numbers in float32."""
    settings = LOSSES | ALL_BALANCING_LOSSES | {"calculate_per_token_loss": per_token_loss}
    ours, stock = make_stock_pair(moe.make_config(12, 4, **settings), mask_kind)
    for _ in range(2):
        hidden = torch.randn(7, 3, 8, device=DEVICE)
        token_ids = torch.randint(0, 10, (7, 3), device=DEVICE)
        is_padding = torch.rand(7, 3, device=DEVICE) < 0.4
        packed = TokenIds(token_ids, is_padding)
        ours_routed, stock_routed = route(ours, hidden, packed), route(stock, hidden, is_padding)
        assert torch.equal(ours_routed.probs, stock_routed.probs)
        assert torch.equal(ours_routed.routing_map, stock_routed.routing_map)
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
        torch.testing.assert_close(ours_routed.input_grad, stock_routed.input_grad, **tolerance)
        torch.testing.assert_close(ours_routed.weight_grad, stock_routed.weight_grad, **tolerance)
        assert len(ours_routed.losses) == 4
        torch.testing.assert_close(ours_routed.losses, stock_routed.losses, rtol=1e-6, atol=0, check_dtype=False)
        # The stock router divides the load of earlier micro-batches by the number of tokens in the newest one.
        ours.reset_global_aux_loss_tracker()
        stock.reset_global_aux_loss_tracker()


def test_z_loss_of_an_fp16_router_is_finite() -> None:
    """The sum over all tokens is above the largest number of fp16. The tolerance is two roundings to fp16."""
    config = moe.make_config(12, 1, moe_z_loss_coeff=1e-3, moe_router_dtype=None, params_dtype=torch.float16)
    ours, stock = make_stock_pair(config, "smoe")
    hidden = torch.randn(2048, 2, config.hidden_size, device=DEVICE, dtype=torch.float16)
    token_ids = TokenIds(torch.zeros(2048, 2, dtype=torch.long, device=DEVICE))
    found, expected = (routed.losses["z_loss"] for routed in (route(ours, hidden, token_ids), route(stock, hidden)))
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-10, atol=0)


def test_expert_bias_follows_the_choices_of_tokens_and_not_the_padding_of_experts() -> None:
    settings = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    padding = {"moe_expert_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": True}
    router = moe.make_router(moe.make_config(4, 2, **settings, **padding), all_visible_mask("smoe", 20, 4))
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]).expand_as(router.weight))
    hidden, ids = torch.ones(5, 3, router.weight.shape[1], device=DEVICE), torch.zeros(5, 3, dtype=torch.long)
    route(router, hidden, TokenIds(ids.to(DEVICE)))
    capacity = 12  # 1.5 times the 2 * 15 / 4 assignments of an expert
    assert router.local_tokens_per_expert.tolist() == [capacity, capacity, 0, 0]


@pytest.mark.parametrize("losses", [{}, LOSSES], ids=["no_losses", "losses"])
@pytest.mark.parametrize("aux_loss_tokens", ["all", "routable"])
@pytest.mark.parametrize("pre_softmax", [True, False])
@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("scale", [1, 1000])
def test_one_visible_expert_is_a_table_lookup(scale, topk, pre_softmax, aux_loss_tokens, losses) -> None:
    config = moe.make_config(5, topk, num_layers=3, **losses)
    # The configuration refuses k = 1 with softmax after top-k, because the weight is constant. Set it afterwards.
    config.moe_router_pre_softmax = pre_softmax
    mask = build_routing_mask(MaskRecipe.from_preset("hash", 5, 3, seed=4), vocab_size=30)
    for layer in range(3):
        router = moe.make_router(config, mask, layer_number=layer + 1, aux_loss_tokens=aux_loss_tokens)
        token_ids = torch.arange(30, device=DEVICE).view(15, 2)
        routed = route(router, scale * torch.randn(15, 2, 8, device=DEVICE), TokenIds(token_ids))
        table = torch.from_numpy(mask.row_of_id[layer].astype(np.int64)).to(DEVICE)
        assert torch.equal(routed.probs, torch.nn.functional.one_hot(table, 5).float())
        assert torch.equal(routed.routing_map, torch.nn.functional.one_hot(table, 5).bool())
        assert torch.equal(routed.weight_grad, torch.zeros_like(routed.weight_grad))
        assert torch.equal(routed.input_grad, torch.zeros_like(routed.input_grad))


@given(case=cases())
def test_follows_the_method(case: Case) -> None:
    """Compare weights, map, losses and gradients with the reference; float32 against float64."""
    router, logits = case.router(), case.logits(scale=2)
    moe.take_metrics()
    probs, routing_map = router.routing(logits, case.token_ids)
    losses = {name: values[1] for name, values in moe.take_metrics().items()}
    output_grad = torch.from_numpy(np.random.default_rng(case.seed + 3).normal(size=probs.shape)).to(probs)
    probs.backward(output_grad)

    exact = logits.detach().double().requires_grad_()
    num_groups, group_topk = case.groups or (1, 1)
    is_padding = None if case.is_padding is None else case.is_padding.flatten()
    reference = moe.reference_routing(
        exact.flatten(0, 1),
        case.visible,
        case.topk,
        score_function=case.score_function,
        pre_softmax=case.pre_softmax,
        expert_bias=router.expert_bias,
        aux_loss_tokens=case.aux_loss_tokens,
        num_groups=num_groups,
        group_topk=group_topk,
        is_padding=is_padding,
        num_sequences=case.shape[1],
    )
    expected_losses = {
        "load_balancing_loss": reference.load_balancing_loss,
        "seq_load_balancing_loss": reference.seq_load_balancing_loss,
        # On one rank, the first micro-batch's global loss equals the local loss.
        "global_load_balancing_loss": reference.load_balancing_loss,
        "z_loss": reference.z_loss,
    }
    coefficients = {
        "load_balancing_loss": 2e-2,
        "seq_load_balancing_loss": 3e-2,
        "global_load_balancing_loss": 1e-2,
        "z_loss": LOSSES["moe_z_loss_coeff"],
    }
    weighted = sum(coefficients[name] * loss for name, loss in expected_losses.items())
    ((reference.probs * output_grad).sum() + LOSS_SCALE * weighted).backward()

    assert torch.equal(routing_map, reference.routing_map)
    tolerance = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(probs, reference.probs, **tolerance)
    torch.testing.assert_close(losses, expected_losses, **tolerance)
    torch.testing.assert_close(logits.grad, exact.grad, **tolerance)
    if router.enable_expert_bias:
        real = slice(None) if is_padding is None else ~is_padding
        assert torch.equal(router.local_tokens_per_expert.long(), routing_map[real].sum(dim=0))


@given(case=cases(), scores=st.sampled_from(["softmax_before", "softmax_after"]), constant=st.integers(-100, 100))
@example(case=Case(0, 12, 4, (20, 3), "softmax_after", "all", groups=(3, 2)), scores="softmax_after", constant=-9)
def test_a_constant_added_to_all_logits_changes_no_choice(case: Case, scores: str, constant: int) -> None:
    """Softmax does not change, so neither do experts and groups. Sums of these logits are exact."""
    case = replace(case, scores=scores)
    router, logits = case.router(), (4 * case.logits(scale=2)).round() / 4
    results = [router.routing(shifted, case.token_ids) for shifted in (logits, logits + constant)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@given(case=cases(dtypes=(torch.float32, torch.bfloat16)), scale=st.sampled_from([1, 30, 500]))
# In these examples, scores of visible experts round to 0, which is the score of invisible experts.
@example(case=Case(0, 20, 4, (5, 3), "softmax_before", "all"), scale=500)
@example(case=Case(0, 20, 4, (5, 3), "sigmoid", "all"), scale=500)
def test_nothing_invisible_is_ever_used(case: Case, scale: float) -> None:
    """Logits and biases of any size select visible experts, and give no weight, gradient or NaN to others.

    A token selects `min(k, V)` experts. If groups limit the choice, a token can select fewer, but at least one.
    """
    logits, visible = case.logits(scale), case.visible
    router = case.router()
    if router.enable_expert_bias:
        router.expert_bias *= scale
    moe.take_metrics()
    probs, routing_map = router.routing(logits, case.token_ids)
    losses = moe.take_metrics()
    probs.sum().backward()
    assert not (routing_map & ~visible).any()
    assert not probs[~routing_map].any()
    num_selected, most = routing_map.sum(dim=1), visible.sum(dim=1).clamp(max=case.topk)
    if case.groups is None:
        assert torch.equal(num_selected, most)
    else:
        num_groups, group_topk = case.groups
        groups_used = routing_map.view(len(routing_map), num_groups, -1).any(dim=-1).sum(dim=-1)
        assert (groups_used <= group_topk).all()
        assert (num_selected >= 1).all()
        assert (num_selected <= most).all()
    grad = logits.grad.flatten(0, 1)
    assert not grad[~visible].any()
    assert all(values.isfinite().all() for values in [probs, *losses.values()])
    # The square root of a softplus that rounds to 0 has no finite slope; the stock router has the same fault.
    if case.score_function != "sqrtsoftplus" or scale == 1:
        assert grad.isfinite().all()


def test_balancing_losses_count_visible_experts_only() -> None:
    """The scores of visible experts round to 0 here, which is the score of invisible experts."""
    visible = np.eye(6, dtype=bool)[None, 1:]  # id i sees expert 0 and expert i + 1
    visible[..., 0] = True
    router = moe.make_router(
        moe.make_config(6, 2, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0),
        moe.make_mask(visible),
    )
    logits = torch.full((5, 1, 6), -500.0, device=DEVICE)
    logits[..., 0] = 0  # All other scores round to 0.
    router.routing(logits.requires_grad_(), TokenIds(torch.arange(5, device=DEVICE).view(5, 1)))
    assert router.global_tokens_per_expert.tolist() == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("has_padding", [False, True])
def test_global_loss_takes_the_load_of_all_micro_batches_of_a_step(has_padding) -> None:
    mask = moe.make_mask(moe.random_visible_sets(3, 1, 20, 5))
    config = moe.make_config(5, 2, moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0)
    router = moe.make_router(config, mask)
    for _ in range(2):
        shares, num_tokens, expected = [], [], []
        moe.take_metrics()
        for _ in range(3):
            logits = torch.randn(8, 2, 5, device=DEVICE)
            token_ids = torch.randint(0, 20, (8, 2), device=DEVICE)
            is_padding = torch.rand(8, 2, device=DEVICE) < 0.5 if has_padding else None
            router.routing(logits, TokenIds(token_ids, is_padding))
            real = slice(None) if is_padding is None else ~is_padding.flatten()
            visible = torch.from_numpy(mask.visible_sets(0)).to(DEVICE)[token_ids.flatten()][real]
            scores = logits.flatten(0, 1)[real].double().masked_fill(~visible, float("-inf")).softmax(dim=-1)
            selected = torch.zeros_like(visible).scatter(1, scores.topk(2).indices, True) & visible
            shares.append(selected.sum(dim=0) / selected.sum())
            num_tokens.append(len(scores))
            share = sum(share * number for share, number in zip(shares, num_tokens, strict=True)) / sum(num_tokens)
            expected.append(5 * (share * scores.mean(dim=0)).sum())
        recorded = moe.take_metrics()["global_load_balancing_loss"]
        torch.testing.assert_close(recorded, sum(expected).view(1), rtol=1e-5, atol=0, check_dtype=False)
        reset_model_temporary_tensors(config, [torch.nn.ModuleList([router])])
        assert not router.ga_steps
        assert not router.global_tokens_per_expert.any()


def test_half_precision_model_counts_tokens_exactly() -> None:
    """The router counts more tokens than bfloat16 can represent. Checkpoints hold no counts of a step."""
    config = moe.make_config(
        moe_router_load_balancing_type="global_aux_loss",
        moe_aux_loss_coeff=1e-2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        params_dtype=torch.bfloat16,
    )
    router = moe.make_router(config, all_visible_mask("smoe", 20, 4)).bfloat16()
    counts = torch.zeros(4, device=DEVICE, dtype=torch.int64)
    for _ in range(3):
        hidden = torch.randn(251, 3, 8, device=DEVICE, dtype=torch.bfloat16)
        token_ids = TokenIds(torch.zeros(251, 3, dtype=torch.int64, device=DEVICE))
        _, routing_map = router(hidden, token_ids)
        counts += routing_map.sum(dim=0)
    assert torch.equal(router.local_tokens_per_expert.long(), counts)
    assert router.global_tokens_per_expert.dtype == router.ga_steps.dtype == torch.float32
    assert router.global_tokens_per_expert.sum() == 3 * 753 * 2
    assert router.state_dict().keys() == {"weight", "expert_bias"}


def test_kernel_of_transformer_engine_gets_the_bias_in_the_dtype_of_the_logits(monkeypatch) -> None:
    """The kernel of cuBLAS would read pairs of bfloat16 numbers as float32 numbers."""
    dtypes = []

    def kernel(weight: Tensor, hidden: Tensor, dtype: torch.dtype, layout: str, bias: Tensor) -> tuple[Tensor]:
        dtypes.append((dtype, bias.dtype))
        return (torch.addmm(bias, hidden.to(dtype), weight.to(dtype).t()),)

    config = moe.make_config(add_bias_linear=True, params_dtype=torch.bfloat16)
    router = moe.make_router(config, all_visible_mask("smoe", 20, 4)).bfloat16()
    torch.nn.init.normal_(router.bias)
    hidden = torch.randn(3, 1, 8, device=DEVICE, dtype=torch.bfloat16)
    expected = TopKRouter.gating(router, hidden)
    monkeypatch.setattr(moe_utils, "te_general_gemm", kernel)
    assert torch.equal(router.gating(hidden), expected)
    assert dtypes == [(torch.float32, torch.float32)]


def test_token_ids_beyond_the_vocabulary_are_refused() -> None:
    if DEVICE.type == "cuda":
        pytest.skip("an index error leaves the CUDA context unusable")
    router = moe.make_router(moe.make_config(), all_visible_mask("smoe", 20, 4))
    for token_id in (20, -1):
        with pytest.raises(IndexError):
            router(torch.randn(1, 1, 8), TokenIds(torch.tensor([[token_id]])))
