"""Show what works on the GPUs of this machine and how fast it is, in ten minutes on one GPU or 30 minutes on several.

The output folder gets a page, campaign.md, and all numbers, campaign.json. Without a GPU, all steps are tried on the
CPU and nothing is measured. The exit code is 1 if a step failed.
"""

import argparse
import importlib.util
import time
from functools import partial
from pathlib import Path

import psutil

from maskmoe.arguments.commands import Parser
from maskmoe.errors import RunFailure, UserError
from maskmoe.processes.run_tool import run_tool

# After its limit, the last step reports, and its findings are read and drawn.
_SECONDS_TO_FINISH = 30


def main() -> None:
    """Run the steps of the command line."""
    print("looking for GPUs", flush=True)
    from gpu_campaign.runner import run_campaign
    from gpu_campaign.step import Context
    from gpu_campaign.steps import STEPS
    from maskmoe.launch.machine import find_devices

    names = [step.name for step in STEPS]
    parser = Parser(
        prog="tools/gpu_campaign.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="STEP",
        help=f"run only these of {' '.join(names)}; the page keeps the other steps of earlier calls",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="end after M minutes, page included (default: 10 on one GPU, else 30)",
    )
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output {output}: {error.strerror}; choose another folder") from error

    # Steps remove the folders of their earlier results.
    if any(output.iterdir()) and not (output / "campaign.json").exists():
        raise UserError(f"--output {output} has files that no campaign has made; choose another folder")
    has_engine = importlib.util.find_spec("transformer_engine") is not None
    context = Context(Path(__file__).resolve().parents[2], output, find_devices(), has_engine)
    only = arguments.only or names
    for step in STEPS:
        for need in step.needs:
            if step.name in only and need not in only and not (output / need).exists():
                raise UserError(f"--only {step.name} needs the step {need}: add {need}, or run it before in {output}")
    minutes = context.minutes if arguments.minutes is None else arguments.minutes
    # The process began before its imports, as a caller with a time limit counts.
    seconds = 60 * minutes - (time.time() - psutil.Process().create_time()) - _SECONDS_TO_FINISH
    campaign = run_campaign(STEPS, context, seconds, partial(print, flush=True), only)
    print(f"{campaign.statement}\nThe page: {output / 'campaign.md'}", flush=True)
    if failed := [step.name for step in campaign.failed if step.name in only]:
        raise RunFailure(f"{len(failed)} of {len(set(only))} steps failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_tool(main)
