"""One rank of the flex dispatcher: `python flex_ranks.py FOLDER`, with RANK and WORLD_SIZE set.

The script fails if outputs, gradients or the rows of the experts of an MoE layer differ from those with another way to
dispatch. Stand-ins replace the libraries.
"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskmoe.megatron_compat import prepare_process

prepare_process()
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import fused_a2a
from support import flex_libraries
from support.small_moe import draw_parameters, make_config, make_layer, make_mask, random_visible_sets
from torch import Tensor

from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.dispatch.kind import DispatchKind
from maskmoe.transformer.dispatch.stock import StockDispatcher
from maskmoe.transformer.moe_layer import MaskMoELayer
from maskmoe.transformer.token_ids import TokenIds, pack_token_ids

NUM_EXPERTS, TOPK, VOCAB_SIZE, SEQUENCE, BATCH, HIDDEN = 8, 3, 9, 12, 4, 16
BACKENDS: dict[str, dict[str, Any]] = {
    "deepep": {},
    "hybridep": {"moe_hybridep_pad_uneven_dispatch_inputs": True},
    # No rank receives more than all rows.
    "ncclep": {"moe_expert_rank_capacity_factor": 8.0},
}


@dataclass(frozen=True)
class Case:
    """A mask and a layer.

    Attributes:
        sizes: Sizes of the visible sets.
        num_visible: The ids see only the first experts, this many.
        settings: Settings of the configuration.
        router_scale: Factor of the router's weights. Weights of selected experts are rounded to 0 if it is large.
    """

    sizes: tuple[int, ...] = (1, 2, 3, 8)
    num_visible: int = NUM_EXPERTS
    settings: Mapping[str, Any] = field(default_factory=dict)
    router_scale: float = 1


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
CASES = {
    "softmax": Case(),
    "weights of 0": Case(router_scale=1000),
    "sigmoid and expert bias": Case(settings=SIGMOID),
    "sigmoid and expert bias, weights of 0": Case(settings=SIGMOID, router_scale=1000),
    "last rank starves": Case(sizes=(1, 2, 4), num_visible=4),
    "one expert per token": Case(sizes=(1,)),
    # Some tokens keep no expert.
    "capacity": Case(settings={"moe_expert_capacity_factor": 0.3}),
    "overlapped shared experts": Case(
        settings={"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_overlap": True}
    ),
    "recomputed": Case(settings={"recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}


@dataclass(frozen=True)
class Outcome:
    """The results of one forward and backward pass.

    Attributes:
        tensors: Output and gradients.
        weights: [tokens, experts].
        routing_map: bool [tokens, experts].
        tokens_per_expert: The rows of the local experts.
    """

    tensors: list[Tensor]
    weights: Tensor
    routing_map: Tensor
    tokens_per_expert: Tensor


def build(case: Case, layout: Mapping[str, int], **settings: Any) -> MaskMoELayer:
    """Build a layer whose parameters depend on the rank and the case only."""
    visible = random_visible_sets(5, 1, VOCAB_SIZE, case.num_visible, case.sizes)
    visible = torch.nn.functional.pad(torch.from_numpy(visible), (0, NUM_EXPERTS - case.num_visible)).numpy()
    sequence_parallel = layout.get("tensor_model_parallel_size", 1) > 1
    config = make_config(
        NUM_EXPERTS, TOPK, hidden_size=HIDDEN, sequence_parallel=sequence_parallel, **layout, **case.settings, **settings
    )
    layer = make_layer(config, make_mask(visible))
    draw_parameters(layer)
    with torch.no_grad():
        layer.router.weight.mul_(case.router_scale)
        for parameter in layer.experts.parameters():
            parameter.mul_(1 + torch.distributed.get_rank() / 8)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(torch.linspace(-0.5, 0.5, NUM_EXPERTS))
    return layer


def run(layer: MaskMoELayer, dtype: torch.dtype = torch.float32, sequence: int = SEQUENCE) -> Outcome:
    """Run a layer forward and backward on random tokens of this rank."""
    torch.manual_seed(torch.distributed.get_rank())
    token_ids = pack_token_ids(TokenIds(torch.randint(0, VOCAB_SIZE, (BATCH, sequence))))
    hidden_states, gradient = torch.randn(2, sequence, BATCH, HIDDEN).to(dtype)
    routed: list[tuple[Tensor, Tensor]] = []
    rows: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, inputs, output: routed.append(output))
    layer.experts.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[1]))
    input = hidden_states.requires_grad_()
    output, _ = layer(input, padding_mask=token_ids)
    output.backward(gradient)
    tensors = [output.detach(), input.grad, *(parameter.grad for parameter in layer.parameters())]
    weights, routing_map = routed[0]
    return Outcome(tensors, weights.detach(), routing_map, rows[0])


def check_rows(outcome: Outcome, group: torch.distributed.ProcessGroup, num_ranks: int) -> None:
    """Check that every expert gets one row for each token that selects the expert."""
    selected = outcome.routing_map.sum(dim=0)
    torch.distributed.all_reduce(selected, group=group)
    expected = selected.view(num_ranks, -1)[parallel_state.get_expert_model_parallel_rank()]
    assert outcome.tokens_per_expert.tolist() == expected.tolist()


def compare(name: str, backend: str) -> None:
    """Compare a case with another way to dispatch, on expert-parallel ranks.

    DeepEP adds up each rank's experts first, as one-copy dispatch does. The other libraries are compared with
    Megatron's all-to-all; the stand-ins add up in the order of the experts, as Megatron does. So all bits are equal.
    """
    case, layout = CASES[name], {"expert_model_parallel_size": 2}
    reference = build(case, layout)
    adds_up_by_rank = backend == "deepep" and "moe_shared_expert_overlap" not in case.settings
    reference.dispatcher = build_dispatcher(DispatchKind.ONE_COPY if adds_up_by_rank else DispatchKind.STOCK, reference)
    flex = build(
        case, layout, moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend, **BACKENDS[backend]
    )
    assert isinstance(flex.dispatcher, StockDispatcher)
    expected, outcome = run(reference), run(flex)
    for value, expected_value in zip(outcome.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=0, atol=0, msg=lambda m: f"{name}, {backend}: {m}")
    check_rows(outcome, torch.distributed.group.WORLD, 2)
    num_selected = outcome.routing_map.sum(dim=1)
    assert (num_selected == 1).any()
    assert (num_selected == TOPK).any() == (max(case.sizes) >= TOPK)
    assert (num_selected == 0).any() == (name == "capacity")
    assert (outcome.weights[outcome.routing_map] == 0).any() == (case.router_scale > 1)


def main() -> None:
    folder, rank, num_ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks
    )
    flex_libraries.install(torch.float32)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    model_parallel_cuda_manual_seed(1)
    for backend in BACKENDS:
        for name in CASES:
            compare(name, backend)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
