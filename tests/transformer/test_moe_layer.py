"""The layer against a plain loop over tokens, on one rank and on several ranks."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from support import small_moe as moe
from support.launchers import RunRanks
from support.small_moe import DEVICE
from torch import Tensor
from torch.nn.functional import linear, silu

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

LOSSES = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def _loss_scale():
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0, device=DEVICE))


def gated_mlp(hidden: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    gate, value = linear(hidden, fc1).chunk(2, dim=-1)
    return linear(silu(gate) * value, fc2)


def reference_layer(config, weights: dict[str, Tensor], hidden: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the output for hidden states [tokens, hidden], and the sum of the weighted router losses."""
    routing = moe.reference_routing(
        linear(hidden, weights["router.weight"]),
        visible,
        config.moe_router_topk,
        pre_softmax=config.moe_router_pre_softmax,
    )
    outputs = []
    for token, state in enumerate(hidden):
        output = torch.zeros_like(state)
        for expert in routing.routing_map[token].nonzero().flatten().tolist():
            mlp = f"experts.local_experts.{expert}."
            expert_output = gated_mlp(state, weights[mlp + "linear_fc1.weight"], weights[mlp + "linear_fc2.weight"])
            output = output + routing.probs[token, expert] * expert_output
        if config.moe_shared_expert_intermediate_size:
            shared = gated_mlp(
                state, weights["shared_experts.linear_fc1.weight"], weights["shared_experts.linear_fc2.weight"]
            )
            if config.moe_shared_expert_gate:
                shared = shared * linear(state, weights["shared_experts.gate_weight"]).sigmoid()
            output = output + shared
        outputs.append(output)
    losses = LOSSES["moe_aux_loss_coeff"] * routing.load_balancing_loss + LOSSES["moe_z_loss_coeff"] * routing.z_loss
    return torch.stack(outputs), losses


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_shared_expert_intermediate_size": 10},
        {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_gate": True},
        {"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_overlap": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("sizes", [None, (1,), (2, 3), (6,)], ids=str)
def test_equals_dense_reference(sizes, topk, overrides) -> None:
    """Cover k > V, V >= k everywhere, and experts without tokens; float32 against float64."""
    config = moe.make_config(6, topk, **LOSSES, **overrides)
    visible_sets = moe.random_visible_sets(2, 1, 9, 6, sizes)
    if sizes != (6,):
        visible_sets[..., 3] = False
        visible_sets[~visible_sets.any(axis=-1), 5] = True
    layer = moe.make_layer(config, moe.make_mask(visible_sets))
    moe.draw_parameters(layer)
    hidden = torch.randn(7, 2, 8, device=DEVICE, requires_grad=True)
    token_ids = torch.randint(0, 9, (2, 7), device=DEVICE)
    output, bias = layer(hidden, padding_mask=token_ids)
    assert bias is None
    output_grad = torch.randn_like(output)
    output.backward(output_grad)

    weights = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
    exact = hidden.detach().double().requires_grad_()
    visible = torch.from_numpy(visible_sets[0]).to(DEVICE)[token_ids.T.flatten()]
    expected, losses = reference_layer(config, weights, exact.flatten(0, 1), visible)
    ((expected * output_grad.flatten(0, 1)).sum() + losses).backward()

    tolerance = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(output.flatten(0, 1), expected, **tolerance)
    torch.testing.assert_close(hidden.grad, exact.grad, **tolerance)
    for name, parameter in layer.named_parameters():
        # Parameters of experts without tokens take part in the backward pass, too, because their hooks must run.
        assert parameter.grad is not None, name
        grad = weights[name].grad
        torch.testing.assert_close(
            parameter.grad, torch.zeros_like(weights[name]) if grad is None else grad, **tolerance
        )


CAPACITY = 4  # Tokens of each expert: 24 tokens with up to 2 of 6 experts, and a capacity factor of 0.5.


def run_with_capacity(**settings: Any) -> SimpleNamespace:
    """Run a layer forward and backward; parameters and input are the same for all settings.

    Returns:
        `results`, the output and all gradients by name; the router's weights `probs`, [tokens, experts];
        `routing_map`, bool [tokens, experts].
    """
    layer = moe.make_layer(moe.make_config(6, 2, **settings), moe.make_mask(moe.random_visible_sets(2, 1, 9, 6)))
    moe.draw_parameters(layer)
    hidden = torch.randn(12, 2, 8, device=DEVICE, requires_grad=True)
    token_ids = torch.randint(0, 9, (2, 12), device=DEVICE)
    probs, routing_map = layer.router(hidden, TokenIds(token_ids.T))
    output, _ = layer(hidden, padding_mask=token_ids)
    output.backward(torch.randn_like(output))
    results = {"output": output.detach(), "hidden": hidden.grad} | {n: p.grad for n, p in layer.named_parameters()}
    return SimpleNamespace(results=results, probs=probs.detach(), routing_map=routing_map)


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
def test_tokens_beyond_the_capacity_are_dropped(drop_policy: str) -> None:
    unlimited = run_with_capacity()
    limited = run_with_capacity(moe_expert_capacity_factor=0.5, moe_token_drop_policy=drop_policy)
    all_probs, everything, kept = unlimited.probs, unlimited.routing_map, limited.routing_map
    dropped = everything & ~kept
    assert dropped.any()
    assert not (kept & ~everything).any()
    assert torch.equal(kept.sum(dim=0), everything.sum(dim=0).clamp(max=CAPACITY))
    assert torch.equal(limited.probs, all_probs * kept)
    if drop_policy == "probs":
        for expert in dropped.any(dim=0).nonzero().flatten():
            least_kept = all_probs[kept[:, expert], expert].min()
            assert least_kept >= all_probs[dropped[:, expert], expert].max()
    else:
        assert torch.equal(kept, everything & (everything.cumsum(dim=0) <= CAPACITY))


@pytest.mark.parametrize("drop_policy", ["probs", "position"])
def test_padding_to_capacity_changes_nothing_but_the_rows(drop_policy: str) -> None:
    """Padding rows have weight 0 and no gradient, also on experts that are invisible to the token of the row."""
    settings = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": drop_policy}
    run = run_with_capacity(**settings)
    padded = run_with_capacity(**settings, moe_pad_expert_input_to_capacity=True)
    assert (padded.routing_map.sum(dim=0) == CAPACITY).all()
    assert run.routing_map.sum() < padded.routing_map.sum()
    torch.testing.assert_close(padded.results, run.results, rtol=1e-5, atol=1e-5)


def test_refuses_what_it_cannot_route() -> None:
    layer = moe.make_layer(moe.make_config(), moe.make_mask(moe.random_visible_sets(0, 1, 9, 4)))
    hidden, token_ids = torch.randn(3, 1, 8, device=DEVICE), torch.zeros(1, 3, dtype=torch.int64, device=DEVICE)
    refused = [
        ("got no token ids", {}),
        ("got no token ids", {"padding_mask": torch.zeros(1, 3, dtype=torch.bool, device=DEVICE)}),
        ("ids or padding of shape", {"input_ids": token_ids.T}),
        ("ids or padding of shape", {"input_ids": token_ids, "padding_mask": token_ids.T.bool()}),
        ("CUDA graphs", {"intermediate_tensors": (hidden,), "padding_mask": token_ids}),
    ]
    for problem, inputs in refused:
        with pytest.raises(ValueError, match=problem):
            layer(hidden, **inputs)
    layer.router.layer_number = None
    with pytest.raises(ValueError, match="set_layer_number"):
        layer(hidden, input_ids=token_ids)
    layer.dispatcher = build_dispatcher(DispatchKind.PLANNED, layer, moe.process_groups())
    with pytest.raises(RuntimeError, match="planned dispatch got token ids without a plan"):
        layer(hidden, padding_mask=token_ids)


NUM_EXPERTS, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 6, 9, 6, 4, 8
LENGTHS = np.array([6, 4, 2, 5])
"""The real tokens of each sequence with padding, so that halves of sequences and of batches have unequal numbers."""


@dataclass(frozen=True)
class Case:
    """A mask and a batch.

    Attributes:
        sizes: sizes of the visible sets.
        experts: the experts that ids can see.
        settings: settings of the configuration.
        scale: scale of the hidden states.
        parts: id i sees experts of part `i % parts`, if the experts are divided into more than one part.
        has_padding: sequences have `LENGTHS` real tokens.
    """

    sizes: tuple[int, ...]
    experts: range = range(NUM_EXPERTS)
    settings: dict[str, Any] = field(default_factory=dict)
    scale: float = 1
    parts: int = 1
    has_padding: bool = False

    @property
    def is_rank_local(self) -> bool:
        """Whether every id sees experts of only one of two ranks."""
        first, last = (expert // (NUM_EXPERTS // 2) for expert in (self.experts[0], self.experts[-1]))
        return self.sizes == (1,) or self.parts > 1 or first == last

    def visible_sets(self) -> np.ndarray:
        """Draw the visible sets, bool [1, vocab, N]."""
        visible = np.zeros((1, VOCAB_SIZE, NUM_EXPERTS), bool)
        num_seen = len(self.experts) // self.parts
        drawn = moe.random_visible_sets(5, 1, VOCAB_SIZE, num_seen, self.sizes)
        for part in range(self.parts):
            experts = self.experts[part * num_seen : (part + 1) * num_seen]
            visible[:, part :: self.parts, experts.start : experts.stop] = drawn[:, part :: self.parts]
        return visible


CASES = {
    "one_expert_per_token": Case((1, 3), settings={"topk": 1}),
    "two_experts_per_token": Case((2, 6)),
    "fewer_visible_than_k": Case((1, 2, 4), settings={"topk": 3}),
    "starved_last_rank": Case((1, 2), experts=range(3)),
    "single_busy_expert": Case((1,), experts=range(4, 5)),
    "one_expert_per_id": Case((1,), settings={"moe_router_topk_scaling_factor": 1.5}, has_padding=True),
    # Every token has two experts; the weight of one expert is rounded to 0.
    "rounded_weights": Case((2, 3), settings={"moe_router_pre_softmax": True}, scale=300),
    "shared_experts": Case((1, 2), settings={"moe_shared_expert_intermediate_size": 10}),
    "overlapped_shared_experts": Case(
        (1, 2), settings={"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_overlap": True}
    ),
    # Every id sees k experts or more, but not within the groups that are chosen for its token.
    "groups": Case((2, 6), settings={"topk": 2, "moe_router_num_groups": 3, "moe_router_group_topk": 1}),
    "rank_local": Case((1, 2, 3), settings={"topk": 2}, parts=2),
    "rank_local_recomputed": Case(
        (1, 3), settings={"recompute_granularity": "selective", "recompute_modules": ["moe"]}, parts=2
    ),
    "rank_local_padding": Case(
        (1, 2, 3),
        settings={"topk": 2, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
        parts=2,
        has_padding=True,
    ),
    "padding": Case((1, 2, 4), settings={"topk": 3}, has_padding=True),
    "all_gather": Case((1, 2, 4), settings={"topk": 3, "moe_token_dispatcher_type": "allgather"}),
}


@dataclass(frozen=True)
class Layout:
    """How ranks divide the layer and its tokens.

    Attributes:
        split_dimension: the dimension of the hidden states [sequence, batch, hidden] that is split.
        settings: settings of the configuration and of the process groups.
        aux_loss_tokens: tokens that load-balancing losses count.
        losses: settings of the router's losses. Losses cover the tokens of all tensor-parallel ranks, but only each
            expert-parallel rank's own tokens.
        plans: dispatch is planned from the ids.
    """

    split_dimension: int
    settings: dict[str, int]
    aux_loss_tokens: str = "all"
    losses: dict[str, Any] = field(default_factory=dict)
    plans: bool = False


ALL_LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 2e-2, 3e-2],
    "moe_z_loss_coeff": 1e-3,
}
TENSOR_PARALLEL = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
LAYOUTS = {
    "expert": Layout(1, {"expert_model_parallel_size": 2}),
    "planned": Layout(1, {"expert_model_parallel_size": 2}, plans=True),
    "expert_with_losses": Layout(1, {"expert_model_parallel_size": 2}, losses=ALL_LOSSES),
    "planned_with_losses": Layout(1, {"expert_model_parallel_size": 2}, losses=ALL_LOSSES, plans=True),
    "tensor": Layout(0, TENSOR_PARALLEL, losses=ALL_LOSSES),
    "tensor_routable": Layout(0, TENSOR_PARALLEL, "routable", ALL_LOSSES),
    "tensor_and_expert": Layout(
        0,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
        losses=ALL_LOSSES,
    ),
}


def is_possible(layout_name: str, case_name: str) -> bool:
    """Return whether a layout supports a case."""
    layout, case = LAYOUTS[layout_name], CASES[case_name]
    if layout.plans or layout_name == "expert_with_losses":
        return case.is_rank_local and "all_gather" not in case_name
    if case.has_padding:
        # Losses cover the tokens of tensor-parallel ranks together, but of each expert-parallel rank alone.
        return layout.split_dimension == 0 or not layout.losses
    return layout_name == "expert" or "shared" not in case_name


def run_case(layout_name: str, case_name: str, rank: int = 0, num_ranks: int = 1) -> dict[str, Tensor]:
    """Return output, losses, and gradients of input and parameters by name; experts have their global index."""
    layout, case = LAYOUTS[layout_name], CASES[case_name]
    parallel = layout.settings if num_ranks > 1 else {}
    config = moe.make_config(
        NUM_EXPERTS,
        **parallel,
        sequence_parallel="tensor_model_parallel_size" in parallel,
        **layout.losses,
        **case.settings,
    )
    layer = moe.make_layer(config, moe.make_mask(case.visible_sets()), aux_loss_tokens=layout.aux_loss_tokens)

    parameters = {}
    first_expert = layer.local_expert_indices[0]
    for local_name, parameter in layer.named_parameters():
        parts = local_name.split(".")
        if "local_experts" in parts:
            parts[2] = str(int(parts[2]) + first_expert)
        parameters[".".join(parts)] = parameter
    shards = config.expert_tensor_parallel_size
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_part_of_weight(name, parameter.shape, rank, shards if "local_experts" in name else 1))

    rng = np.random.default_rng(0)

    def part_of(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.split(values, num_ranks, axis=layout.split_dimension)[rank]).to(DEVICE)

    shape = (SEQUENCE, BATCH, HIDDEN)
    hidden = part_of(case.scale * rng.normal(size=shape)).float().requires_grad_()
    output_grad = part_of(rng.normal(size=shape)).float()
    token_ids = TokenIds(part_of(rng.integers(0, VOCAB_SIZE, shape[:2])).T.contiguous())
    if case.has_padding:
        is_padding = np.arange(SEQUENCE)[:, None] >= LENGTHS  # [sequence, batch]
        token_ids = replace(token_ids, is_padding=part_of(is_padding).T.contiguous())
    if layout.plans and num_ranks > 1:
        assert layer.dispatcher._is_planned
        token_ids = moe.plan_ids(layer, token_ids)
    elif getattr(layer.dispatcher, "_is_planned", False):
        layer.dispatcher = build_dispatcher(DispatchKind.ONE_COPY, layer, moe.process_groups())
    moe.take_metrics()
    output, _ = layer(hidden, padding_mask=pack_token_ids(token_ids))
    output.backward(output_grad)
    # A layer with a plan skips its router if each id sees one expert; the router's weight then has no gradient.
    grads = {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in parameters.items()}
    # Undo the scale, so that all cases can use the same tolerance.
    grads = {name: grad / case.scale for name, grad in grads.items()}
    grads["statistics"] = layer.router.statistics.take()[0].cpu()
    if layer.router.local_tokens_per_expert is not None:
        grads["router.local_tokens_per_expert"] = layer.router.local_tokens_per_expert
    return {"output": output.detach() / case.scale, "input_grad": hidden.grad} | moe.take_metrics() | grads


def _part_of_weight(name: str, shape: torch.Size, rank: int, shards: int) -> Tensor:
    """Draw this rank's part of a weight; the whole weight depends only on its name."""
    rng = np.random.default_rng(np.frombuffer(name.encode(), np.uint8))
    if "linear_fc1" in name:  # Gate and value are each divided along their rows.
        whole = rng.normal(size=(2, shape[0] // 2 * shards, shape[1]))
        return torch.from_numpy(np.split(whole, shards, axis=1)[rank % shards].reshape(shape))
    if "linear_fc2" in name:
        whole = rng.normal(size=(shape[0], shape[1] * shards))
        return torch.from_numpy(np.split(whole, shards, axis=1)[rank % shards])
    return torch.from_numpy(rng.normal(size=shape))


def results_of_rank() -> dict[str, Tensor]:
    """Return the results of this rank for all layouts and their cases."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for layout_name, layout in LAYOUTS.items():
        moe.initialize_parallelism(**layout.settings)
        for case_name in CASES:
            if is_possible(layout_name, case_name):
                for key, value in run_case(layout_name, case_name, rank, num_ranks).items():
                    results[f"{layout_name}/{case_name}/{key}"] = value
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def two_ranks(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """Return the results of each of two ranks for all layouts and their cases."""
    return run_ranks(results_of_rank, tmp_path_factory.mktemp("parallel_layer"))


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (layout, case)
        for layout in LAYOUTS
        for case in CASES
        if is_possible(layout, case) and not layout.endswith("_with_losses")
    ],
)
def test_ranks_equal_one(layout: str, case: str, two_ranks: list[dict[str, Tensor]]) -> None:
    whole = {key: value.cpu() for key, value in run_case(layout, case).items()}
    prefix = f"{layout}/{case}/"
    ranks = [{k.removeprefix(prefix): v for k, v in rank.items() if k.startswith(prefix)} for rank in two_ranks]
    assert set().union(*ranks) == whole.keys()
    for key, value in whole.items():
        parts = [rank[key] for rank in ranks if key in rank]
        if key in ("output", "input_grad"):
            found = torch.cat(parts, dim=LAYOUTS[layout].split_dimension)
        elif "local_experts" not in key:
            found = sum(parts)
        elif len(parts) == 1:
            found = parts[0]
        elif "linear_fc1" in key:
            found = torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1).flatten(0, 1)
        else:
            found = torch.cat(parts, dim=1)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("case", [case for case in CASES if is_possible("expert_with_losses", case)])
def test_global_loss_covers_data_parallel_ranks(case: str, two_ranks: list[dict[str, Tensor]]) -> None:
    """The shares of the ranks add up to the loss of one rank that has the whole batch."""
    layout, loss = "expert_with_losses", "global_load_balancing_loss"
    shares = [rank[f"{layout}/{case}/{loss}"] for rank in two_ranks]
    torch.testing.assert_close(sum(shares), run_case(layout, case)[loss].cpu())


@pytest.mark.parametrize("case", [case for case in CASES if is_possible("planned", case)])
def test_plan_changes_no_bit(case: str, two_ranks: list[dict[str, Tensor]]) -> None:
    """Compare with one-copy dispatch, with and without losses."""
    for rank in two_ranks:
        planned = {key: value for key, value in rank.items() if key.startswith("planned") and f"/{case}/" in key}
        assert any("seq_load_balancing_loss" in key for key in planned)
        for key, value in planned.items():
            assert torch.equal(value, rank[key.replace("planned", "expert", 1)]), key
