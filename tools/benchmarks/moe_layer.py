"""Measure a whole MoE layer, forward and backward, against stock Megatron-Core's layer and a floor.

The time includes router, dispatch, experts and combine. Under a rank-local mask it also includes planning, which a
model does once for all layers. Masks and floor are those of `dispatcher.py`. Every token uses k experts on either side.

    torchrun --standalone --nproc-per-node 2 tools/benchmarks/moe_layer.py
"""

from maskmoe.megatron_compat import prepare_process

prepare_process()
import argparse
from collections.abc import Callable, Iterator

import harness
import routed_tokens
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from ranks import compare, run_and_report
from routed_tokens import RoutedTokens, as_stock, draw_tokens, exchange_floor, with_main_grads
from torch import Tensor

from maskmoe.transformer.dispatch.choose import build_dispatcher
from maskmoe.transformer.layer_specs import backend_arguments, get_maskmoe_decoder_block_spec
from maskmoe.transformer.token_ids import pack_token_ids

LAYER_SETTINGS = {
    "moe_aux_loss_coeff": 1e-2,
    "moe_router_dtype": "fp32",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "normalization": "RMSNorm",
}
"""Settings of an MoE layer."""


def build_layers(
    config: TransformerConfig, tokens: RoutedTokens, groups: ProcessGroupCollection
) -> tuple[MoELayer, MoELayer]:
    """Build a MaskMoE layer, which dispatches as the tokens say, and a stock layer with everything fused."""
    stock_config = as_stock(config)
    blocks = (
        (config, get_maskmoe_decoder_block_spec(config, tokens.visible_experts)),
        (stock_config, get_gpt_decoder_block_spec(stock_config, **backend_arguments(stock_config))),
    )
    layers = [block.layer_specs[0].submodules.mlp(each, pg_collection=groups).cuda() for each, block in blocks]
    for layer in layers:
        layer.set_layer_number(1)
    ours, stock = layers
    ours.dispatcher = build_dispatcher(tokens.kind, ours, groups)
    return ours, stock


def compute(layer: MoELayer, tokens: RoutedTokens, padding_mask: Callable[[], Tensor | None]) -> Callable[[], None]:
    """Return one forward and backward pass; gradients of weights are added to `main_grad`, as in training.

    Args:
        layer: the layer.
        tokens: its input.
        padding_mask: makes the layer's argument `padding_mask`.
    """
    wrapped = with_main_grads(layer)

    def work() -> None:
        hidden = tokens.hidden.detach().requires_grad_()
        with wrapped.no_sync():
            output, _ = wrapped(hidden, padding_mask=padding_mask())
            output.backward(tokens.gradient)

    return work


def cases(arguments: argparse.Namespace, groups: ProcessGroupCollection) -> Iterator[harness.Case]:
    """Yield the cases for every k, N and mask."""
    num_ranks = groups.ep.size()
    for config in routed_tokens.configs(
        arguments, num_ranks, moe_ffn_hidden_size=arguments.ffn_hidden_size, **LAYER_SETTINGS
    ):
        for mask_name in routed_tokens.MASKS:
            tokens = draw_tokens(config, arguments.tokens, mask_name, groups, arguments.dispatches_alone)
            our_layer, stock_layer = build_layers(config, tokens, groups)
            ours = compute(our_layer, tokens, lambda tokens=tokens: pack_token_ids(tokens.plan_ids()))
            stock = compute(stock_layer, tokens, lambda: None)
            floor = exchange_floor(tokens.hidden.flatten(0, 1), tokens.gradient.flatten(0, 1), groups.ep)
            name = f"MoE layer {mask_name} top-{config.moe_router_topk} of {config.num_moe_experts} ranks {num_ranks}"
            name += " with Transformer Engine" if arguments.transformer_engine else ""
            yield compare(name, ours, "stock", stock)
            yield compare(f"{name} to the floor", ours, "floor", floor)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = harness.make_parser(__doc__, repeats=15)
    routed_tokens.add_arguments(parser)
    parser.add_argument("--ffn-hidden-size", type=int, default=512, help="width of an expert (default: %(default)s)")
    return parser


if __name__ == "__main__":
    run_and_report(cases, build_parser())
