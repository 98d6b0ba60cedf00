"""Measure the router of an MoE layer, forward and backward, against Megatron-Core's router of the same sizes.

Both routers compute the load-balancing loss. Ours also looks up the visible experts and counts statistics.

    python tools/benchmarks/router.py
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
from collections.abc import Callable, Iterator

import harness
import routed_tokens
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from moe_layer import LAYER_SETTINGS, build_layers
from ranks import compare, run_and_report
from routed_tokens import RoutedTokens, draw_tokens
from torch import Tensor

from maskmoe.transformer.token_ids import TokenIds


def route(router: Callable[[Tensor], tuple[Tensor, Tensor]], tokens: RoutedTokens) -> Callable[[], None]:
    """Return one forward and backward pass."""

    def work() -> None:
        probs, _ = router(tokens.hidden.detach().requires_grad_())
        probs.backward(torch.ones_like(probs))

    return work


def cases(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> Iterator[harness.Case]:
    """Yield the cases for every k, N and mask."""
    settings = LAYER_SETTINGS | {"moe_ffn_hidden_size": 8}
    for config in routed_tokens.configs(arguments, groups.ep.size(), **settings):
        for mask_name in routed_tokens.MASKS:
            tokens = draw_tokens(config, arguments.tokens, mask_name, groups)
            ours, stock = build_layers(config, tokens, groups)
            token_ids = TokenIds(tokens.ids).transpose()
            name = f"router {mask_name} top-{config.moe_router_topk} of {config.num_moe_experts}"
            masked = route(lambda hidden, router=ours.router, ids=token_ids: router(hidden, ids), tokens)
            yield compare(name, masked, "stock", route(stock.router, tokens))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=15)
    routed_tokens.add_arguments(parser)
    return parser


if __name__ == "__main__":
    run_and_report(cases, build_parser())
