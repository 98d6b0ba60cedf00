"""Command line arguments that only training has."""

from argparse import ArgumentParser, Namespace
from importlib.util import find_spec

from maskmoe.command_line import ranges
from maskmoe.training.settings.arguments import add_check_argument
from maskmoe.training.settings.watch_arguments import add_watch_arguments


def add_pretraining_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the arguments that only training has, and let signals save a checkpoint by default."""
    group = parser.add_argument_group(title="long runs")
    group.add_argument(
        "--change-routing-mask",
        action="store_true",
        help="let the mask in --routing-mask replace another mask of the checkpoint in --load. Both must have the same "
        "vocabulary, number of experts and number of tables. Later checkpoints hold the new mask, so the flag then "
        "changes nothing",
    )
    group.add_argument(
        "--keep-last-checkpoints",
        type=ranges.CHECKPOINTS,
        metavar="N",
        help="keep the newest N checkpoints in --save and the multiples of --save-retain-interval, and remove all "
        "others; by default all checkpoints are kept",
    )
    group.add_argument(
        "--hang-timeout",
        type=ranges.TIMEOUT,
        metavar="SECONDS",
        help="end the run, and name the rank that hangs, if no rank begins a micro-batch for this long; "
        "default: half of --distributed-timeout-minutes",
    )
    group.add_argument(
        "--report-interval",
        type=ranges.INTERVAL,
        default=60.0,
        metavar="SECONDS",
        help="write the page report.html into the run folder at most this often, and at the end; 0: never "
        "(default: 60)",
    )
    add_watch_arguments(parser)
    parser.set_defaults(
        exit_signal_handler=True,
        log_timers_to_tensorboard=True,  # the page shows the time of an iteration
        # Megatron switches asynchronous saving off without this setting, with a warning that is easily overlooked.
        use_persistent_ckpt_worker=True,
        async_strategy="nvrx" if find_spec("nvidia_resiliency_ext") else "mcore",
    )
    return add_check_argument(parser)


def hang_timeout(args: Namespace) -> float:
    """Return the seconds without a micro-batch after which a rank counts as hanging.

    The default lets the verdict come before `--distributed-timeout-minutes`, when NCCL would abort without a verdict.
    """
    return args.hang_timeout or 0.5 * 60 * args.distributed_timeout_minutes
