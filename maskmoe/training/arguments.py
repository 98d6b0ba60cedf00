"""Command line arguments: Megatron's, with ours in a group of their own."""

import argparse
import sys


def add_maskmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `MaskMoE` group to Megatron's parser; pass as `extra_args_provider`.

    Some of Megatron's defaults change: the router computes in fp32, experts are reached by all-to-all, and the
    coefficient of the load-balancing loss is 1e-2. `--eval-interval` has a default, without which
    Megatron-Core 0.19 fails. Checkpoints of the distributed optimizer are saved so that they load into any layout. On a
    machine without CUDA, fusions and the NCCL backend are off.
    """
    group = parser.add_argument_group(title="MaskMoE")
    group.add_argument(
        "--routing-mask",
        metavar="FILE",
        help="routing mask made by tools/build_routing_mask.py. May be left out when a checkpoint is loaded: "
        "every checkpoint holds the mask it was made with",
    )
    group.add_argument(
        "--moe-aux-loss-tokens",
        choices=["all", "routable"],
        default="all",
        help="average the load-balancing loss over all tokens, or over those with two or more visible experts",
    )
    parser.set_defaults(
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=1e-2,
        eval_interval=1000,
        dist_ckpt_optim_fully_reshardable=True,
    )
    if "maskmoe.cpu" in sys.modules:
        parser.set_defaults(**sys.modules["maskmoe.cpu"].argument_defaults())
    return parser
