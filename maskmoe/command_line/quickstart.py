"""Train a MaskMoE language model from raw text on this machine.

The stages are tokenizer, dataset, token counts, routing mask, training with expert parallelism (on all GPUs; without
GPUs, 2 processes on the CPU), evaluation, export to transformers, and a sample of text that the exported model
generates. With the defaults, the quickstart takes four to ten minutes on two CPU cores. If the command is interrupted,
start the same command again to resume. After a change of settings, only the affected stages are repeated.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError

from maskmoe.command_line import ranges
from maskmoe.command_line.parser import Parser
from maskmoe.comparison.held_out import check_text
from maskmoe.comparison.quickstart import Quickstart, Settings, quickstart_suite
from maskmoe.comparison.quickstart_report import write_report
from maskmoe.comparison.stage import StageFolder
from maskmoe.comparison.status_line import StatusLine
from maskmoe.errors import UserError
from maskmoe.files.json_files import first_problem
from maskmoe.files.paths import runs_folder
from maskmoe.launch.devices import find_devices
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.routing_mask.assignment import ASSIGNMENTS


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parse the command line, by default of this process. Defaults are the values of the quickstart's suite.

    Raises:
        UserError: a value is out of range, or an input file is missing.
    """
    parser = Parser(
        description=__doc__,
        epilog="The run folder gets report.md, loss.png, the checkpoints, the exported model, the routing mask, "
        "commands.sh with the command line of every stage, and logs/ with the full output of each stage.",
    )
    suite = quickstart_suite()
    (variant,) = suite.variants.values()
    assert variant.mask != "none"
    defaults = {**variant.flags, **variant.mask}
    parser.set_defaults(**{flag.replace("-", "_"): words[0] for flag, words in defaults.items() if words})
    parser.set_defaults(vocab_size=suite.data.vocab_size)
    parser.set_defaults(seed=variant.seeds[0])

    def add(
        group: argparse._ArgumentGroup, flag: str, kind: Callable[[str], float], text: str, metavar: str = "N"
    ) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} [%(default)s]")

    files = parser.add_argument_group("files")
    text = "text to train on: JSON lines (.jsonl) or plain text, also .gz and .zst "
    text += "[sources and documentation of the installed Python and its packages]"
    files.add_argument("--input", nargs="+", type=Path, default=(), metavar="FILE", help=text)
    keys = "key that holds the text in JSON lines [text]"
    files.add_argument("--json-keys", default="text", metavar="KEY", help=keys)
    run_dir = runs_folder() / "quickstart"
    files.add_argument("--run-dir", type=Path, default=run_dir, metavar="DIR", help="all files [runs/quickstart]")

    model = parser.add_argument_group("model")
    add(model, "--vocab-size", ranges.TOKENIZER_SIZE, "number of ids of the tokenizer")
    add(model, "--num-layers", ranges.LAYERS, "number of transformer layers")
    add(model, "--hidden-size", ranges.HIDDEN_SIZE, "width of the model, a multiple of 32")
    add(model, "--num-experts", ranges.EXPERTS, "number of experts in each layer")

    mask = parser.add_argument_group("routing mask")
    add(mask, "--frequent-mass", ranges.SHARE, "the ids that make up this share of the text see several experts", "P")
    visible = "experts that such an id sees; all other ids see one expert"
    add(mask, "--frequent-visible-experts", ranges.EXPERTS, visible, "V")
    mask.add_argument("--assignment", choices=ASSIGNMENTS, help="how experts are assigned to ids [%(default)s]")

    training = parser.add_argument_group("training")
    add(training, "--seq-length", ranges.SEQ_LENGTH, "number of tokens in a sample")
    add(training, "--global-batch-size", ranges.BATCH_SIZE, "number of samples in an iteration")
    add(training, "--train-iters", ranges.ITERATIONS, "number of iterations")
    add(training, "--lr", ranges.LEARNING_RATE, "largest learning rate", "X")
    add(training, "--seed", ranges.SEED, "seed of the initial weights and of the order of the data")
    training.add_argument("--prompt", metavar="TEXT", help="start of the sample [the start of a held-out text]")
    try:
        return Settings(**vars(parser.parse_args(arguments)))
    except ValidationError as error:
        place, _, problem = first_problem(error).partition(": ")
        field = place.partition(".")[0]  # a place such as `input.0` also says which of several values is wrong
        raise UserError(f"--{field.replace('_', '-')}: {problem}") from error


def main() -> None:
    """Run the command."""
    settings = parse_settings()
    if settings.input:
        check_text(settings.input, settings.json_keys, settings.seq_length)
    quickstart = Quickstart(settings, find_devices())
    line = StatusLine(sys.stdout)
    with locked_folder(settings.run_dir):
        folder = StageFolder(settings.run_dir)
        data = tuple(quickstart.data.stages())
        folder.run(data, line)
        stages = (*data, *quickstart.model_stages())
        folder.run(stages, line)
        line.print(write_report(quickstart, {stage.name: folder.seconds(stage) or 0.0 for stage in stages}))
