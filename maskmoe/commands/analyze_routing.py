"""Measure how a checkpoint, or a series of checkpoints, routes a fixed probe text.

The command runs every model over the same tokens. It measures the load of the experts and the assignments that a
capacity would drop, the entropy of the routers, the ids of each expert, the number of experts of each id, the experts
that are chosen together, and the changes from each checkpoint to the next.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError
from maskmoe.routing_analysis.settings import SPLITS, AnalysisSettings, Conversion

if TYPE_CHECKING:
    from maskmoe.routing_analysis.trace import RoutingTrace

_DEFAULTS = AnalysisSettings()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process.

    Raises:
        UserError: two flags contradict each other.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  %(prog)s --load runs/a/checkpoints --data-path data/web_text_document --split 95,5,0 \\
    --token-frequency counts.safetensors --output-dir runs/a/routing
  %(prog)s --load runs/a/model --input README.md --output-dir routing

files in --output-dir:
  routing.json           all numbers but the tables of ids and of pairs of experts; lists over the layers with experts
  load.csv               assignments by checkpoint, layer, frequency band and expert
  drops.csv              share of the assignments that a capacity would drop, by capacity factor
  entropy.csv            entropy, its bound, and mutual information of experts with ids and the next layer's experts
  specialisation.csv     the most frequent ids of each expert
  coactivation.csv       share of the tokens with a pair of experts, in a layer or in consecutive layers, for the last
                         checkpoint
  fluctuation.csv        share of the experts that changed since the previous checkpoint
  distinct_experts.csv   number of experts of each id that occurs often enough
  *.png                  plots of load, entropy, fluctuation, coactivation and distinct experts""",
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--load",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="the models of the series, in order: Megatron checkpoints, models in transformers' format, or folders of "
        "Megatron checkpoints, which stand for all their checkpoints",
    )
    models.add_argument(
        "--ckpt-step", type=int, nargs="+", default=(), metavar="I", help="use only these iterations of a folder"
    )
    models.add_argument(
        "--tokenizer-type",
        metavar="T",
        help="type of the tokenizer (default: the checkpoint's; NullTokenizer: no tokenizer)",
    )
    models.add_argument("--tokenizer-model", metavar="F", help="file of the tokenizer (default: the checkpoint's)")
    models.add_argument(
        "--scratch-dir",
        type=Path,
        metavar="DIR",
        help="folder in which Megatron checkpoints are converted (default: the system's)",
    )

    probe = parser.add_argument_group("probe text")
    text = probe.add_mutually_exclusive_group(required=True)
    text.add_argument("--data-path", metavar="P", help="prefix of a dataset; P.bin and P.idx exist")
    text.add_argument(
        "--input", type=Path, nargs="+", metavar="F", help="text files (.jsonl, .txt, also .gz and .zst) to tokenize"
    )
    probe.add_argument(
        "--split", metavar="A,B,C", help="Megatron's --split of --data-path (default: the whole dataset)"
    )
    probe.add_argument(
        "--eval-split", choices=SPLITS, default="valid", help="the part of --split to use (default: %(default)s)"
    )
    probe.add_argument(
        "--json-key", default="text", metavar="K", help="key of the text in JSON lines (default: %(default)s)"
    )
    probe.add_argument(
        "--tokens",
        type=int,
        default=_DEFAULTS.num_tokens,
        metavar="T",
        help="number of tokens, from all over --data-path or from the beginning of --input (default: %(default)s)",
    )
    probe.add_argument("--seq-length", type=int, metavar="S", help="tokens in a window (default: the model's)")
    probe.add_argument(
        "--batch-size",
        type=int,
        default=_DEFAULTS.batch_size,
        metavar="B",
        help="windows in a batch (default: %(default)s)",
    )

    measures = parser.add_argument_group("statistics")
    measures.add_argument(
        "--token-frequency",
        type=Path,
        metavar="F",
        help="token counts for the frequency bands, made by tools/count_token_frequency.py (default: the probe's)",
    )
    measures.add_argument(
        "--capacity-factors",
        type=float,
        nargs="+",
        default=_DEFAULTS.capacity_factors,
        metavar="C",
        help="capacity factors for the share of dropped assignments (default: 1 1.25 1.5 2)",
    )
    measures.add_argument(
        "--micro-batch-tokens",
        type=int,
        metavar="T",
        help="tokens that share a capacity (default: the tokens of a batch)",
    )
    measures.add_argument(
        "--min-occurrences",
        type=int,
        default=_DEFAULTS.min_occurrences,
        metavar="O",
        help="occurrences in the probe from which an id counts in distinct_experts.csv (default: %(default)s)",
    )
    measures.add_argument(
        "--top-ids",
        type=int,
        default=_DEFAULTS.num_top_ids,
        metavar="R",
        help="ids to list for each expert (default: %(default)s)",
    )

    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--save-traces", action="store_true", help="also write the routing of every token, trace_1.safetensors, …"
    )
    arguments = parser.parse_args()
    if arguments.input is not None and arguments.split is not None:
        raise UserError("--split is for --data-path; --input is used from its beginning")
    return arguments


def settings_from(arguments: argparse.Namespace) -> AnalysisSettings:
    """Return the settings that the command line gives."""
    return AnalysisSettings(
        num_tokens=arguments.tokens,
        seq_length=arguments.seq_length,
        batch_size=arguments.batch_size,
        capacity_factors=tuple(arguments.capacity_factors),
        micro_batch_tokens=arguments.micro_batch_tokens,
        min_occurrences=arguments.min_occurrences,
        num_top_ids=arguments.top_ids,
    )


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder for the results, unless it exists; remove a new folder if it is empty at the end.

    Raises:
        UserError: the folder cannot be made, or is not writable.
    """
    is_new = not path.exists()
    try:
        path.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {path}: {error.strerror}") from error
    try:
        yield path
    finally:
        if is_new:
            with suppress(OSError):
                path.rmdir()


def main() -> None:
    """Run the analysis that the command line describes, write its files and print its table."""
    arguments = parse_arguments()
    settings = settings_from(arguments)
    settings.check()

    # The analysis needs torch and Megatron, `--help` does not.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.routing_analysis.analysis import analyze
    from maskmoe.routing_analysis.models import find_models
    from maskmoe.routing_analysis.probe import DatasetText, FileText
    from maskmoe.routing_analysis.report import write_results
    from maskmoe.routing_analysis.tables import terminal_table
    from maskmoe.routing_mask import TokenFrequency

    if arguments.input is None:
        text = DatasetText(arguments.data_path, arguments.split, arguments.eval_split)
    else:
        text = FileText(tuple(arguments.input), arguments.json_key)
    conversion = Conversion(arguments.scratch_dir, arguments.tokenizer_type, arguments.tokenizer_model)
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    models = find_models(arguments.load, arguments.ckpt_step)
    with output_folder(arguments.output_dir) as folder, ExitStack() as traces:
        trace_files = [folder / f"trace_{number}.safetensors" for number in range(1, len(models) + 1)]

        def keep_trace(position: int, trace: "RoutingTrace") -> None:
            if arguments.save_traces:
                # Temporary files become the traces when the analysis has succeeded.
                trace.save(traces.enter_context(atomic_output(trace_files[position])))

        analysis = analyze(models, text, settings, frequency, conversion, keep_trace, progress=True)
        written = write_results(analysis, folder)
    print(*terminal_table(analysis), sep="\n")
    print()
    for path in [*written, *(trace_files if arguments.save_traces else ())]:
        print(f"written  {path}")
