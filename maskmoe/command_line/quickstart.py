"""Train a MaskMoE language model from raw text on this machine.

The stages are tokenizer, dataset, token counts, routing mask, training with expert parallelism (on all GPUs; without
GPUs, 2 processes on the CPU), evaluation, export to transformers, and a sample of text that the exported model
generates. With the defaults, the quickstart takes four to ten minutes on two CPU cores. If the command is interrupted,
start the same command again to resume. After a change of settings, only the affected stages are repeated.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import Parser, add_option
from maskmoe.command_line.compare import check_mask
from maskmoe.comparison.quickstart import Quickstart, Settings, quickstart_suite, write_report
from maskmoe.comparison.stage import StageFolder, StatusLine, stopping_in_order
from maskmoe.files.paths import RUNS
from maskmoe.launch.machine import find_devices
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.routing_mask.assignment import ASSIGNMENTS


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """Parse the command line, by default of this process. Defaults are the values of the quickstart's suite.

    Raises:
        UserError: A value is out of range.
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
    parser.set_defaults(vocab_size=suite.data.vocab_size, num_layers=suite.layers, seed=variant.seeds[0])

    def add(
        group: argparse._ArgumentGroup, flag: str, kind: Callable[[str], float], text: str, metavar: str = "N"
    ) -> None:
        group.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: %(default)s)")

    files = parser.add_argument_group("files")
    text = "text to train on: JSON lines (.jsonl) or plain text, also .gz and .zst "
    text += "(default: sources and documentation of the installed Python and its packages)"
    files.add_argument("--input", nargs="+", type=Path, default=(), metavar="FILE", help=text)
    add_option(files, "--json-keys KEY", "key that holds the text in JSON lines", default="text")
    add_option(files, "--run-dir DIR", "all files", Path, default=RUNS / "quickstart")

    model = parser.add_argument_group("model")
    add(model, "--vocab-size", ranges.TOKENIZER_SIZE, "number of ids of the tokenizer")
    add(model, "--num-layers", ranges.LAYERS, "number of transformer layers")
    add(model, "--hidden-size", ranges.HIDDEN_SIZE, "width of the model, a multiple of 32")
    add(model, "--num-experts", ranges.EXPERTS, "number of experts in each layer")

    mask = parser.add_argument_group("routing mask")
    add(mask, "--frequent-mass", ranges.SHARE, "the ids that make up this share of the text see several experts", "P")
    visible = "experts that such an id sees; all other ids see one expert"
    add(mask, "--frequent-visible-experts", ranges.EXPERTS, visible, "V")
    mask.add_argument(
        "--assignment", choices=ASSIGNMENTS, help="how experts are assigned to ids (default: %(default)s)"
    )

    training = parser.add_argument_group("training")
    add(training, "--seq-length", ranges.WholeNumber(32, ranges.COUNT.most), "number of tokens in a sample")
    add(training, "--global-batch-size", ranges.COUNT, "number of samples in an iteration")
    add(training, "--train-iters", ranges.COUNT, "number of iterations")
    add(training, "--lr", ranges.LEARNING_RATE, "largest learning rate", "X")
    add(training, "--seed", ranges.RUN_SEED, "seed of the initial weights and of the order of the data")
    training.add_argument("--prompt", metavar="TEXT", help="start of the sample (default: the start of the text)")
    options = parser.parse_args(arguments)
    return Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})


def main() -> None:
    """Run the command."""
    settings = parse_settings()
    import transformers  # noqa: F401 (the export needs the package: without it, fail before the training)

    quickstart = Quickstart(settings, find_devices())
    folder, line = StageFolder(quickstart.run.folder), StatusLine(sys.stdout)
    # Check before anything is written.
    quickstart.data.check()
    check_mask(quickstart.run)
    folder.check((quickstart.report, quickstart.loss_curve, quickstart.sample), settings.input)
    with locked_folder(quickstart.run.folder, "--run-dir"), stopping_in_order():
        data = tuple(quickstart.data.stages())
        folder.run(data, line)
        stages = (*data, *quickstart.model_stages())
        folder.run(stages, line)
        line.print(write_report(quickstart, {stage.name: folder.seconds(stage) or 0.0 for stage in stages}))
