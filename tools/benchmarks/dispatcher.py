"""Time of dispatch and combine, forward and backward, against stock Megatron-Core's all-to-all dispatcher and a floor.

The floor is what any exchange of one copy of each token costs: four all-to-alls, and a gather of rows with each.
`rank-local` masks are dispatched by plan; under an `any` mask every id sees all experts. Experts do nothing. Counts the
all-to-alls, too, and the MiB that a rank puts into them.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/dispatcher.py
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import harness
import numpy as np
import torch

# Prepares the process, hence before megatron.
from ranks import join_ranks

# isort: split
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from zipf import zipf_mask, zipf_probabilities

from maskmoe.routing_mask import MaskRecipe
from maskmoe.transformer.dispatch_plan import DispatchPlanner, LayerPlan
from maskmoe.transformer.one_copy_dispatcher import OneCopyDispatcher
from maskmoe.transformer.visible_experts import VisibleExperts

_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class Tokens:
    """What one rank has to dispatch.

    Attributes:
        hidden, gradient: [tokens, 1, hidden].
        routing_map: bool [tokens, experts].
        plan: of the tokens, under a rank-local mask.
        received_map: bool [rows, experts], of the tokens that the plan brings here.
    """

    hidden: Tensor
    gradient: Tensor
    routing_map: Tensor
    plan: LayerPlan | None
    received_map: Tensor | None


def draw_tokens(config: TransformerConfig, num_tokens: int, mask_name: str, groups: ProcessGroupCollection) -> Tokens:
    """Zipf-distributed ids, and the k experts of each that a fixed score prefers."""
    num_experts, topk, num_ranks = config.num_moe_experts, config.moe_router_topk, groups.ep.size()
    if mask_name == "rank-local":
        recipe = MaskRecipe(
            num_experts=num_experts,
            num_layers=1,
            assignment="rank-local",
            frequent_mass=1.0,
            frequent_visible_experts=max(2, topk),
            expert_model_parallel_size=num_ranks,
        )
    else:
        recipe = MaskRecipe.from_preset("smoe", num_experts, 1)
    visible_experts = VisibleExperts(config, zipf_mask(recipe, _VOCAB_SIZE), groups).cuda()
    rng = np.random.default_rng(torch.distributed.get_rank())
    ids = torch.from_numpy(rng.choice(_VOCAB_SIZE, num_tokens, p=zipf_probabilities(_VOCAB_SIZE))).cuda()
    preference = torch.rand(_VOCAB_SIZE, num_experts, generator=torch.Generator().manual_seed(0)).cuda()

    def choose(ids: Tensor) -> Tensor:
        scores = preference[ids].masked_fill(~visible_experts(ids, 0).experts, -1.0)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(topk, dim=1).indices, True)

    plan = received_map = None
    if visible_experts.is_rank_local:
        plan = DispatchPlanner(visible_experts, topk, [0], groups.ep).plan(ids.unsqueeze(0)).of_table[0]
        received_map = choose(plan.received_ids)
    hidden, gradient = torch.randn(2, num_tokens, 1, config.hidden_size, device=ids.device)
    return Tokens(hidden, gradient, choose(ids), plan, received_map)


def dispatch_stock(config: TransformerConfig, tokens: Tokens, groups: ProcessGroupCollection) -> Callable[[], None]:
    num_local = config.num_moe_experts // groups.ep.size()
    first = groups.ep.rank() * num_local
    dispatcher = MoEAlltoAllTokenDispatcher(num_local, list(range(first, first + num_local)), config, groups)

    def work() -> None:
        hidden, probs = _leaves(tokens.hidden, tokens.routing_map)
        rows, weights = dispatcher.dispatch_preprocess(hidden, tokens.routing_map, probs)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
        output = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        _backward(dispatcher.combine_postprocess(output), weights, tokens)

    return work


def dispatch_ours(config: TransformerConfig, tokens: Tokens, groups: ProcessGroupCollection) -> Callable[[], None]:
    dispatcher = OneCopyDispatcher(config.num_moe_experts, groups.ep)

    def work() -> None:
        hidden, probs = _leaves(tokens.hidden, tokens.routing_map if tokens.plan is None else tokens.received_map)
        flat = hidden.flatten(0, 1)
        if tokens.plan is None:
            rows, weights, dispatch = dispatcher.dispatch(flat, probs, tokens.routing_map)
        else:
            received = dispatcher.send(flat, tokens.plan)
            rows, weights, dispatch = dispatcher.dispatch_received(received, probs, tokens.received_map, tokens.plan)
        _backward(dispatcher.combine(rows, dispatch).view_as(hidden), weights, tokens)

    return work


def floor(tokens: Tokens, groups: ProcessGroupCollection) -> Callable[[], None]:
    plan = tokens.plan
    there, back = (list(plan.rows_from), list(plan.rows_to)), (list(plan.rows_to), list(plan.rows_from))

    def work() -> None:
        for values in (tokens.hidden.flatten(0, 1), tokens.gradient.flatten(0, 1)):
            gathered = values.index_select(0, plan.sent.rows)
            received = values.new_empty(sum(plan.rows_from), values.shape[1])
            torch.distributed.all_to_all_single(received, gathered, *there, group=groups.ep)
            returned = torch.empty_like(values)
            torch.distributed.all_to_all_single(returned, received, *back, group=groups.ep)
            returned.index_select(0, plan.sent.order)

    return work


def _leaves(hidden: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.detach().requires_grad_(), routing_map.float().requires_grad_()


def _backward(output: Tensor, weights: Tensor, tokens: Tokens) -> None:
    torch.autograd.backward([output, weights], [tokens.gradient, torch.ones_like(weights)])


class Traffic:
    """Counts all-to-alls of floating-point numbers while a function runs."""

    def __init__(self, work: Callable[[], None]):
        self.calls = self.bytes = 0
        stock = torch.distributed.all_to_all_single

        def counted(output: Tensor, input: Tensor, *args, **kwargs):
            if input.is_floating_point():
                self.calls += 1
                self.bytes += input.nbytes
            return stock(output, input, *args, **kwargs)

        torch.distributed.all_to_all_single = counted
        try:
            work()
        finally:
            torch.distributed.all_to_all_single = stock

    def __str__(self) -> str:
        return f"{self.calls} all-to-alls, {self.bytes / 2**20:.1f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument(
        "--experts", nargs="+", default=["1/16", "2/16", "8/64"], metavar="K/N", help="top-K of N experts"
    )
    harness.add_arguments(parser, repeats=15)
    arguments = parser.parse_args()

    groups = join_ranks()
    num_ranks = groups.ep.size()
    is_reporting = torch.distributed.get_rank() == 0

    def measured(work: Callable[[], None]) -> Callable[[], float]:
        def between_barriers() -> None:
            torch.distributed.barrier()
            work()
            torch.cuda.synchronize()
            torch.distributed.barrier()

        return harness.seconds(between_barriers)

    cases = []
    for topk, num_experts in (tuple(map(int, pair.split("/"))) for pair in arguments.experts):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=arguments.hidden_size,
            num_attention_heads=4,
            num_moe_experts=num_experts,
            moe_router_topk=topk,
            moe_router_pre_softmax=topk == 1,
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=num_ranks,
            add_bias_linear=False,
        )
        for mask_name in ("rank-local", "any"):
            tokens = draw_tokens(config, arguments.tokens, mask_name, groups)
            ours, stock = dispatch_ours(config, tokens, groups), dispatch_stock(config, tokens, groups)
            name = f"dispatch {mask_name} top-{topk} of {num_experts} ranks {num_ranks}"
            traffic = Traffic(ours), Traffic(stock)
            if is_reporting:
                print(f"{name}: ours {traffic[0]}; stock {traffic[1]}")
            cases.append(harness.Case(name, "s", measured(ours), measured(stock)))
            if mask_name == "rank-local" and topk == 1:
                cases.append(harness.Case(f"{name} to the floor", "s", measured(ours), measured(floor(tokens, groups))))
    results = harness.run(cases, arguments.repeats)
    if is_reporting:
        harness.report(results, arguments.json)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
