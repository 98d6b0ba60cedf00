r"""Measure how a checkpoint, or a series of checkpoints, routes a fixed probe text.

The command runs every model over the same tokens. It measures the load of the experts, the entropy of the routers, the
ids of each expert, the number of experts of each id, and the changes from each checkpoint to the next.

Examples:
  %(prog)s --load runs/a/checkpoints --data-path data/web_text_document --split 95,5,0 \
    --token-frequency counts.safetensors --output-dir runs/a/routing
  %(prog)s --load runs/a/model --data-path data/books_text_document --output-dir routing

files in --output-dir; each table has the columns checkpoint, iteration and layer, and:
  layers.csv       load (maximum over mean), entropy and its bound, weight of the best expert, share of tokens that see
                   one expert
  load.csv         assignments of each expert, by the frequency band of the ids
  explained.csv    share of the routing that the id alone explains: near 1, a hash layer would route alike
  fluctuation.csv  share of the experts that changed since the previous checkpoint, by group of tokens
  ids.csv          number of experts of each id that occurs often enough
  top_ids.csv      the most frequent ids of each expert
  load.png, bands.png, fluctuation.png
                   load of the experts, their tokens by frequency band, and changes (needs two checkpoints)
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from maskmoe.analysis.routing_statistics import SPLITS, AnalysisSettings
from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, command_parser, say_loading
from maskmoe.arguments.parser import add_option
from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import refused_by_system
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.files.paths import check_folder
from maskmoe.routing_mask.frequency import TokenFrequency


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process."""
    parser = command_parser(__doc__)
    models = parser.add_argument_group("models")
    series = "the models of the series, in order: Megatron checkpoints, models in transformers' format, or folders of "
    series += "Megatron checkpoints, which stand for all their checkpoints"
    add_option(models, "--load PATH", series, Path, nargs="+", required=True)
    add_option(models, "--ckpt-step I", "use only these iterations of a folder", ranges.NUMBER, nargs="+")
    add_option(models, "--tokenizer-type T", "type of the tokenizer (default: the checkpoint's; NullTokenizer: none)")
    add_option(models, "--tokenizer-model F", "file of the tokenizer (default: the checkpoint's)")

    probe = parser.add_argument_group("probe text")
    add_option(probe, "--data-path P", "prefix of a dataset; P.bin and P.idx exist", required=True)
    add_option(probe, "--split A,B,C", "Megatron's --split of --data-path (default: the whole dataset)", str)
    add_option(probe, "--eval-split", "the part of --split to use", choices=SPLITS, default="valid")
    tokens = "number of tokens, from all over the dataset"
    add_option(probe, "--tokens T", tokens, ranges.COUNT, default=AnalysisSettings.tokens)
    window = "tokens in a window (default: the model's, at most an eighth of --tokens)"
    add_option(probe, "--seq-length S", window, ranges.COUNT)
    add_option(probe, "--batch-size B", "windows in a batch", ranges.COUNT, default=AnalysisSettings.batch_size)

    counts = "token counts for the frequency bands, made by maskmoe count (default: the probe's)"
    add_option(parser, "--token-frequency F", counts, Path)
    add_option(parser, "--output-dir DIR", "folder for the results", Path, required=True)
    traces = "also write the routing of every token, trace_1.safetensors, …"
    parser.add_argument("--save-traces", action="store_true", help=traces)
    add_force_argument(parser)
    return parser.parse_args()


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make a folder unless it exists; remove it at the end if it is empty. Raises UserError if it cannot be made."""
    with refused_by_system(f"cannot write to --output-dir {path}"):
        path.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if not any(path.iterdir()):
            path.rmdir()


def _inputs(arguments: argparse.Namespace) -> list[Path]:
    """Return the files and folders that the command reads."""
    files = [path for path in (arguments.token_frequency, arguments.tokenizer_model) if path]
    return [*arguments.load, *dataset_files(arguments.data_path), *map(Path, files)]


def main() -> None:
    """Run the analysis that the command line describes, write its files and print its table."""
    arguments = parse_arguments()
    for path in arguments.load:
        check_folder(path, "--load")
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    given = vars(arguments)
    settings = AnalysisSettings(
        **{name: given[name] for name in AnalysisSettings.__dataclass_fields__ if name in given}
    )

    say_loading("importing PyTorch and Megatron-Core")
    # The analysis needs torch and Megatron, `--help` does not.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.analysis.model_series import find_models
    from maskmoe.analysis.probe_text import DatasetText
    from maskmoe.analysis.routing_analysis import analyze
    from maskmoe.analysis.routing_report import PLOT_NAMES, TABLE_NAMES, terminal_table, write_plots, write_tables

    text = DatasetText(arguments.data_path, arguments.split, arguments.eval_split)
    say_loading("finding the models and the text")
    models = find_models(arguments.load, arguments.ckpt_step or ())
    folder: Path = arguments.output_dir
    numbers = range(1, len(models) + 1) if arguments.save_traces else ()
    trace_files = [folder / f"trace_{number}.safetensors" for number in numbers]
    results = [folder / name for name in (*TABLE_NAMES, *PLOT_NAMES)]
    with output_folder(folder), ExitStack() as outputs:
        check_outputs([*results, *trace_files], _inputs(arguments), arguments.force)
        # Temporary files become the traces when the analysis has succeeded.
        temporary = [outputs.enter_context(atomic_output(path)) for path in trace_files]
        analysis = analyze(models, text, settings, frequency, temporary)
        written = [*write_tables(analysis, folder), *write_plots(analysis, folder), *trace_files]
    print(*terminal_table(analysis), "", *(f"written  {path}" for path in written), sep="\n")
