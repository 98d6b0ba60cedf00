"""An MoE layer in parallel layouts.

Parameters and inputs of a case do not depend on layout and rank, so that all layouts must give the same results.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from support.small_moe import (
    DEVICE,
    initialize_parallelism,
    make_config,
    make_layer,
    make_mask,
    plan_ids,
    process_groups,
    random_visible_sets,
    take_metrics,
)
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.dispatch.planned import PlannedDispatcher
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

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
    num_experts: int = NUM_EXPERTS
    has_padding: bool = False

    @property
    def is_rank_local(self) -> bool:
        """Whether every id sees experts of only one of two ranks."""
        return self.parts > 1 or self.experts.start // (NUM_EXPERTS // 2) == (self.experts.stop - 1) // (
            NUM_EXPERTS // 2
        )

    def visible_sets(self) -> np.ndarray:
        """Draw the visible sets, bool [1, vocab, N]."""
        visible = np.zeros((1, VOCAB_SIZE, self.num_experts), bool)
        num_seen = len(self.experts) // self.parts
        drawn = random_visible_sets(5, 1, VOCAB_SIZE, num_seen, self.sizes)
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
    "starved_rank_recomputed": Case(
        (1, 2), range(3), {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    ),
    # Every token has two experts; the weight of one expert is rounded to 0.
    "rounded_weights": Case((2, 3), settings={"moe_router_pre_softmax": True}, scale=300),
    "shared_experts": Case((1, 2), settings={"moe_shared_expert_intermediate_size": 10}),
    "overlapped_shared_experts": Case(
        (1, 2), settings={"moe_shared_expert_intermediate_size": 10, "moe_shared_expert_overlap": True}
    ),
    # Every id sees k experts or more, but not within the groups that are chosen for its token.
    "groups": Case((2, 6), settings={"topk": 2, "moe_router_num_groups": 3, "moe_router_group_topk": 1}),
    "rank_local": Case((1, 2, 3), settings={"topk": 2}, parts=2),
    "local_to_four_ranks": Case((1, 2), range(8), parts=4, num_experts=8),
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
        num_ranks: number of ranks.
    """

    split_dimension: int
    settings: dict[str, int]
    aux_loss_tokens: str = "all"
    losses: dict[str, Any] = field(default_factory=dict)
    plans: bool = False
    num_ranks: int = 2


LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 2e-2, 3e-2],
    "moe_z_loss_coeff": 1e-3,
}
TENSOR_PARALLEL = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
LAYOUTS = {
    "expert": Layout(1, {"expert_model_parallel_size": 2}),
    "planned": Layout(1, {"expert_model_parallel_size": 2}, plans=True),
    "planned_on_four_ranks": Layout(1, {"expert_model_parallel_size": 4}, plans=True, num_ranks=4),
    "expert_with_losses": Layout(1, {"expert_model_parallel_size": 2}, losses=LOSSES),
    "planned_with_losses": Layout(1, {"expert_model_parallel_size": 2}, losses=LOSSES, plans=True),
    "tensor": Layout(0, TENSOR_PARALLEL, losses=LOSSES),
    "tensor_routable": Layout(0, TENSOR_PARALLEL, "routable", LOSSES),
    "tensor_and_expert": Layout(
        0,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
        losses=LOSSES,
    ),
}


def is_possible(layout_name: str, case_name: str) -> bool:
    """Return whether a layout supports a case."""
    layout, case = LAYOUTS[layout_name], CASES[case_name]
    if 4 in (layout.num_ranks, case.parts):
        return layout.num_ranks == case.parts
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
    config = make_config(
        case.num_experts,
        **parallel,
        sequence_parallel="tensor_model_parallel_size" in parallel,
        **layout.losses,
        **case.settings,
    )
    layer = make_layer(config, make_mask(case.visible_sets()), aux_loss_tokens=layout.aux_loss_tokens)

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
        assert isinstance(layer.dispatcher, PlannedDispatcher)
        token_ids = plan_ids(layer, token_ids)
    elif isinstance(layer.dispatcher, PlannedDispatcher):
        layer.dispatcher = build_dispatcher(DispatchKind.ONE_COPY, layer, process_groups())
    take_metrics()
    output, _ = layer(hidden, padding_mask=pack_token_ids(token_ids))
    output.backward(output_grad)
    # Undo the scale, so that all cases can use the same tolerance.
    grads = {name: parameter.grad / case.scale for name, parameter in parameters.items()}
    if layer.router.local_tokens_per_expert is not None:
        grads["router.local_tokens_per_expert"] = layer.router.local_tokens_per_expert
    return {"output": output.detach() / case.scale, "input_grad": hidden.grad} | take_metrics() | grads


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
    """Return the results of this rank for all layouts of this number of ranks, and their cases."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    results = {}
    for layout_name, layout in LAYOUTS.items():
        if layout.num_ranks != num_ranks:
            continue
        initialize_parallelism(**layout.settings)
        for case_name in CASES:
            if is_possible(layout_name, case_name):
                for key, value in run_case(layout_name, case_name, rank, num_ranks).items():
                    results[f"{layout_name}/{case_name}/{key}"] = value
        parallel_state.destroy_model_parallel()
    return results
