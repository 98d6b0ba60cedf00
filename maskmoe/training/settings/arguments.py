"""Command line arguments: Megatron's, and this package's in a group of their own."""

import argparse
import os
from collections.abc import Mapping

from maskmoe.command_line import ranges
from maskmoe.training.settings.flag_values import report_errors_in_one_line


def add_maskmoe_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `MaskMoE` group, without changes of Megatron's defaults; return the parser."""
    group = parser.add_argument_group(title="MaskMoE")
    group.add_argument(
        "--routing-mask",
        metavar="FILE",
        help="routing mask made by maskmoe mask. It may be left out when a checkpoint is loaded: "
        "every checkpoint holds its routing mask",
    )
    group.add_argument(
        "--moe-aux-loss-tokens",
        choices=["all", "routable"],
        default="all",
        help="average the load-balancing loss over all tokens, or over the tokens with two or more visible experts",
    )
    group.add_argument(
        "--qk-layernorm-all-heads",
        action="store_true",
        help="with --qk-layernorm, normalise queries and keys over all heads together, as OLMoE does, instead of each "
        "head by itself",
    )
    group.add_argument(
        "--no-verify-checkpoint",
        action="store_false",
        dest="verify_checkpoint",
        help="do not compare the files of the checkpoint to load with the digests that were saved with them. "
        "All ranks share this work. Missing and shortened files are found in any case",
    )
    group.add_argument(
        "--no-moe-permute-fusion",
        action="store_false",
        dest="moe_permute_fusion",
        help="do not permute tokens by Transformer Engine's kernels, which are the default on a GPU with Transformer "
        "Engine 2.6 or newer",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="print everything that Megatron prints, such as all arguments, to the console. By default this goes to "
        "files in the run folder: logs/rankN.log and args.yaml",
    )
    return parser


def add_maskmoe_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `MaskMoE` group to Megatron's parser and change some defaults; pass as `extra_args_provider`.

    The router computes in fp32, tokens reach experts by all-to-all, and the coefficient of the load-balancing loss is
    1e-2. `--eval-interval` gets a default, without which Megatron-Core 0.19 fails. Checkpoints of the distributed
    optimizer are saved in the form that loads into any layout. On a machine without CUDA, fusions and the NCCL backend
    are off. On a GPU, the defaults are the fastest ones that work with the installed packages.
    """
    # Only now: `--help` does not wait for PyTorch, which these modules import.
    from maskmoe.megatron_compat import cpu
    from maskmoe.megatron_compat.gpu import GpuPackages
    from maskmoe.megatron_compat.patches import escape_percent_signs_in_help

    escape_percent_signs_in_help(parser)
    report_errors_in_one_line(parser)
    add_maskmoe_flags(parser)
    replace_help(
        parser,
        {
            "--moe-token-dispatcher-type": "how tokens reach their experts (default: alltoall)",
            "--eval-interval": "iterations between two evaluations on the validation set (default: 1000)",
            "--hybrid-layer-pattern": "the layers of a hybrid model, one symbol for each: M (Mamba), G (gated delta "
            "net), * (attention), + (multi-latent attention), - (MLP), E (MoE). | separates pipeline stages, and / "
            "precedes the layers of multi-token prediction. For example: M-ME|M-*E/*E",
        },
    )
    parser.set_defaults(
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=1e-2,
        eval_interval=1000,
        dist_ckpt_optim_fully_reshardable=True,
        loads_non_persistent=False,  # has no flag: set when the checkpoint is chosen
    )
    defaults = cpu.argument_defaults() if cpu.is_installed() else GpuPackages.installed().argument_defaults()
    parser.set_defaults(**defaults)
    return parser


def replace_help(parser: argparse.ArgumentParser, texts: Mapping[str, str]) -> None:
    """Replace the help texts of Megatron's flags that have another default or other values in MaskMoE.

    Args:
        parser: the parser of the flags. Flags that the parser lacks are ignored.
        texts: the new help texts by flag.
    """
    for action in parser._actions:
        for flag in texts.keys() & set(action.option_strings):
            action.help = texts[flag]


def may_change_mask(args: argparse.Namespace) -> bool:
    """Return whether the run's mask may differ from the checkpoint's; only training has the flag for it."""
    return getattr(args, "change_routing_mask", False)


def add_check_argument(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--check`, with which pretraining only reports what the run would be and need, and its errors."""
    parser.add_argument(
        "--check",
        metavar="RANKS",
        type=ranges.RANKS,
        nargs="?",
        const=os.environ.get("WORLD_SIZE", "1"),
        help="do not train. Check the other arguments and all files for a run of RANKS processes, one for each GPU, by "
        "default WORLD_SIZE or 1; print layout, parameters, memory and cost of the run, and every error. Needs no "
        "GPU and no torchrun. On a machine without GPUs, the check assumes GPUs with Transformer Engine and Apex "
        "unless --distributed-backend gloo is given",
    )
    parser.add_argument(
        "--json",
        dest="check_json",
        action="store_true",
        help="print the report of --check as one JSON object; maskmoe/training/preflight/report.py documents its keys",
    )
    return parser
