"""The flags of MaskMoE, which are added to Megatron's; this module imports neither PyTorch nor Megatron."""

import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

from maskmoe.arguments.parser import OneLineParser, add_option

if TYPE_CHECKING:
    from maskmoe.megatron_compat.gpu import GpuPackages


def add_maskmoe_flags(parser: ArgumentParser) -> ArgumentParser:
    """Add the `MaskMoE` group, without changes of Megatron's defaults; return the parser."""
    group = parser.add_argument_group(title="MaskMoE")
    add_option(
        group,
        "--routing-mask FILE",
        "routing mask made by maskmoe mask. It may be left out when a checkpoint is loaded: every checkpoint holds its "
        "routing mask",
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
        "Engine",
    )
    group.add_argument(
        "--no-moe-grouped-gemm",
        action="store_false",
        dest="moe_grouped_gemm",
        help="compute experts one after the other, not by Transformer Engine's grouped linear layers, which are the "
        "default on a GPU from Ampere on with Transformer Engine",
    )
    group.add_argument(
        "--moe-counts-on-device",
        action="store_true",
        help="leave the numbers of the experts' rows on the GPU, so that no layer waits for them. Needs Transformer "
        "Engine 2.19, and has an effect from Hopper on. Nobody has run it on a GPU yet",
    )
    group.add_argument(
        "--verbose",
        action="store_true",
        help="print everything that Megatron prints, such as all arguments, to the console. By default a training run "
        "writes this to logs/rankN.log and args.yaml in the run folder, and other commands leave it out",
    )
    return parser


def _escape_percent_signs_in_help(parser: ArgumentParser) -> None:
    """Make `--help` printable, in which argparse takes each `%` for the beginning of a conversion.

    The help of `--moe-paged-stash-buffer-size-factor-cuda` in megatron-core 0.19.2 contains "10%)".
    """
    for action in parser._actions:
        action.help = action.help and re.sub(r"(?<!%)%(?![%(])", "%%", action.help)


def add_maskmoe_arguments(parser: ArgumentParser, packages: "GpuPackages | None" = None) -> ArgumentParser:
    """Add the `MaskMoE` group to Megatron's parser and change some defaults; pass as `extra_args_provider`.

    On a machine without CUDA, fusions and the NCCL backend are off. On a GPU, the defaults are the fastest ones that
    work with the installed packages, or with other `packages` of the machines that train.
    """
    # Only now: `--help` does not wait for PyTorch, which these modules import.
    from maskmoe.megatron_compat import cpu
    from maskmoe.megatron_compat.gpu import GpuPackages

    # Errors name the command and this flag: Megatron's parser has the name of a file, and `--help` few of its flags.
    parser.prog = f"maskmoe {Path(sys.argv[0]).stem}"
    parser.add_argument("--help-all", action="help", help="show all flags and exit")
    _escape_percent_signs_in_help(parser)
    # A wrong value is reported in one line, where argparse would print a usage of 700 lines first.
    vars(parser)["error"] = MethodType(OneLineParser.error, parser)
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
        eval_interval=1000,  # Megatron-Core 0.19 fails without a value
        dist_ckpt_optim_fully_reshardable=True,  # the form that loads into any layout
        stream_ckpt_dequant=False,
        change_routing_mask=False,  # only training has the flag
    )
    if packages is None and cpu.is_installed():
        parser.set_defaults(**cpu.argument_defaults())
    else:
        parser.set_defaults(**(packages or GpuPackages.installed()).argument_defaults())
    return parser


def add_pretraining_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments that only training has, and let signals save a checkpoint by default."""
    group = parser.add_argument_group(title="long runs")
    group.add_argument(
        "--change-routing-mask",
        action="store_true",
        help="let the mask in --routing-mask replace another mask of the checkpoint in --load. Later checkpoints hold "
        "the new mask, so the flag then changes nothing",
    )
    add_option(
        group,
        "--keep-last-checkpoints N",
        "keep the newest N checkpoints in --save and the multiples of --save-retain-interval, and remove all others; "
        "by default all checkpoints are kept",
        positive,
    )
    group = parser.add_argument_group(title="spikes and idle experts")
    deviations = (
        "report a step whose loss or gradient norm is more than D robust deviations above or below the median of the "
        "steps before. A robust deviation is 1.4826 times the median absolute deviation, and at least 0.5%% of the "
        "median. inf: report no step"
    )
    window = "the number of steps before that a step is compared with; with fewer than half of them, no step is judged"
    intervals = "report an expert that got no token in N log intervals in a row; 0: never"
    add_option(group, "--spike-deviations D", deviations, float, default=15.0)
    add_option(group, "--spike-window STEPS", window, positive, default=128)
    add_option(group, "--collapse-intervals N", intervals, int, default=10)
    parser.set_defaults(
        exit_signal_handler=True,
        log_timers_to_tensorboard=True,  # the status shows the time of an iteration
        # Megatron switches asynchronous saving off without this setting, with a warning that is easily overlooked.
        use_persistent_ckpt_worker=True,
        async_strategy="mcore",
    )
    return parser


def positive(text: str) -> int:
    """Convert the word of a command line to a whole number of at least 1. Raises ArgumentTypeError."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def replace_help(parser: ArgumentParser, texts: Mapping[str, str]) -> None:
    """Replace the help texts of flags that have another default or other values in MaskMoE; ignore unknown flags."""
    for action in parser._actions:
        for flag in texts.keys() & set(action.option_strings):
            action.help = texts[flag]
