"""Measure dispatch and combine, forward and backward, against Megatron-Core's all-to-all dispatcher and a floor.

The floor is the cost of any exchange of one copy of each token: four all-to-alls, and a gather of rows with each.
Under a `rank-local` mask, dispatch is planned. Under an `any` mask every id sees all experts, under a `hash` mask one.
Experts do nothing.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/dispatcher.py
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
from collections.abc import Callable, Iterator

import harness
import routed_tokens
import torch
from fixed_router import FixedRouter
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import compare, run_and_report
from routed_tokens import RoutedTokens, draw_tokens, exchange_floor
from torch import Tensor

from maskmoe.routing_mask.dispatch_kind import DispatchKind
from maskmoe.transformer.dispatch.one_copy import OneCopyDispatcher


def choose(tokens: RoutedTokens, ids: Tensor, topk: int) -> Tensor:
    """Return the k visible experts of each id [tokens] that a fixed score prefers: bool [tokens, experts]."""
    visible = tokens.visible_experts.mask_table(0).look_up(ids).experts
    generator = torch.Generator().manual_seed(0)
    preference = torch.rand(routed_tokens.VOCAB_SIZE, visible.shape[1], generator=generator).to(ids.device)
    scores = preference[ids].masked_fill(~visible, -1.0)
    return torch.zeros_like(visible).scatter(1, scores.topk(topk, dim=1).indices, True)


def dispatch_stock(
    config: TransformerConfig, tokens: RoutedTokens, groups: ProcessGroupCollection
) -> Callable[[], None]:
    """Return work that dispatches by Megatron-Core's own dispatcher, in the steps of `MoELayer`."""
    num_local = config.num_moe_experts // groups.ep.size()
    first = groups.ep.rank() * num_local
    dispatcher = MoEAlltoAllTokenDispatcher(num_local, list(range(first, first + num_local)), config, groups)
    routing_map = choose(tokens, tokens.ids[0], config.moe_router_topk)

    def work() -> None:
        hidden, probs = _leaves(tokens.hidden, routing_map)
        rows, weights = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, _, weights = dispatcher.dispatch_postprocess(rows, weights)
        output = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        _backward(dispatcher.combine_postprocess(output), weights, tokens)

    return work


def dispatch_ours(
    config: TransformerConfig, tokens: RoutedTokens, groups: ProcessGroupCollection
) -> Callable[[], None]:
    """Return work that dispatches in the way that a MaskMoE layer chooses for these tokens."""
    token_ids = tokens.plan_ids()
    routing_map = choose(tokens, token_ids.ids.flatten(), config.moe_router_topk)
    dispatcher = OneCopyDispatcher(config, groups.ep, is_planned=tokens.kind is DispatchKind.PLANNED)
    fixed_weight = 1.0 if tokens.visible_experts.max_visible == [1] else None

    def work() -> None:
        hidden, probs = _leaves(tokens.hidden, routing_map)
        router = FixedRouter(probs, routing_map, fixed_weight=fixed_weight)
        dispatched = dispatcher.start_dispatch(hidden, token_ids.transpose(), router)()
        output = dispatched.combine(dispatched.expert_input)
        _backward(output, dispatched.weights, tokens)

    return work


def _leaves(hidden: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden states and weights that gradients are computed for."""
    return hidden.detach().requires_grad_(), routing_map.float().requires_grad_()


def _backward(output: Tensor, weights: Tensor, tokens: RoutedTokens) -> None:
    """Run the backward pass from the output [tokens, 1, hidden] and the weights."""
    gradients = {output: tokens.gradient} | ({weights: torch.ones_like(weights)} if weights.requires_grad else {})
    torch.autograd.backward(list(gradients), list(gradients.values()))


def cases(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> Iterator[harness.Case]:
    """Yield the cases for every k, N and mask."""
    num_ranks = groups.ep.size()
    hidden, gradient = (
        torch.randn(2, arguments.tokens, arguments.hidden_size).cuda().to(getattr(torch, arguments.dtype))
    )
    floor = exchange_floor(hidden, gradient, groups.ep)
    for config in routed_tokens.configs(arguments, num_ranks):
        for mask_name in (*routed_tokens.MASKS, *(["hash"] if config.moe_router_topk == 1 else [])):
            tokens = draw_tokens(config, arguments.tokens, mask_name, groups, arguments.dispatches_alone)
            if tokens.kind is DispatchKind.STOCK:
                continue  # Both sides would be Megatron-Core's dispatcher.
            ours, stock = dispatch_ours(config, tokens, groups), dispatch_stock(config, tokens, groups)
            name = f"dispatch {mask_name} top-{config.moe_router_topk} of {config.num_moe_experts} ranks {num_ranks}"
            name += " with Transformer Engine" if arguments.transformer_engine else ""
            yield compare(name, ours, "stock", stock)
            yield compare(f"{name} to the floor", ours, "floor", floor)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=15)
    routed_tokens.add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_and_report(cases, build_parser())
