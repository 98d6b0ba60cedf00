"""Command line arguments of the watches over loss, gradient norm and routing."""

from argparse import ArgumentParser

from maskmoe.command_line.parser import Number, WholeNumber


def add_watch_arguments(parser: ArgumentParser) -> None:
    """Add the group of the watches to Megatron's parser."""
    group = parser.add_argument_group(title="spikes and silent faults")
    group.add_argument(
        "--spike-action",
        choices=["report", "skip", "none"],
        default="report",
        help="report: report each step whose loss or gradient norm is off, which means far from the values of the "
        "steps before. skip: if a value is too high, also do not apply the step's update. none: do not judge steps "
        "(default: report)",
    )
    group.add_argument(
        "--spike-deviations",
        type=Number(0, is_above=True),
        default=15.0,
        metavar="D",
        help="a value is off if it is more than D robust deviations above or below the median of the steps before. A "
        "robust deviation is 1.4826 times the median absolute deviation, and at least 0.5%% of the median (default: "
        "15)",
    )
    group.add_argument(
        "--spike-window",
        type=WholeNumber(2, 100_000),
        default=128,
        metavar="STEPS",
        help="the number of steps before that a step is compared with; with fewer than half of them, no step is judged "
        "(default: 128)",
    )
    group.add_argument(
        "--collapse-intervals",
        type=WholeNumber(0),
        default=10,
        metavar="N",
        help="report an expert or an expert-parallel rank that got no token in N log intervals in a row, and a MoE "
        "layer whose routing entropy was 0 in all of them; 0: never (default: 10)",
    )
