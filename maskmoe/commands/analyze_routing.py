"""Say how a checkpoint, or a series of checkpoints, routes a fixed probe text.

Runs every model over the same tokens, and measures: the load of the experts and what a capacity would drop, the entropy
of the routers, which ids each expert gets, over how many experts an id spreads, which experts are chosen together, and
how much of it changes from one checkpoint to the next.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError
from maskmoe.routing_analysis import (
    AnalysisSettings,
    Conversion,
    DatasetText,
    FileText,
    RoutingTrace,
    analyze,
    find_models,
    write_results,
)
from maskmoe.routing_analysis.probe import SPLITS, ProbeText
from maskmoe.routing_analysis.tables import terminal_table
from maskmoe.routing_mask import TokenFrequency

_DEFAULTS = AnalysisSettings()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python tools/analyze_routing.py --load runs/a/checkpoints --data-path data/web_text_document --split 95,5,0 \\
    --token-frequency counts.safetensors --output-dir runs/a/routing
  python tools/analyze_routing.py --load runs/a/model --input README.md --output-dir routing

files in --output-dir:
  routing.json           all numbers but tables of ids and pairs of experts; lists over the layers with experts
  load.csv               assignments by checkpoint, layer, frequency band and expert
  drops.csv              share of assignments that a capacity would drop, by capacity factor
  entropy.csv            entropy and its bound, and how much experts tell of ids and of the next layer's experts
  specialisation.csv     the most frequent ids of each expert
  coactivation.csv       share of the tokens with two experts in a layer, or in one and the next; of the last checkpoint
  fluctuation.csv        share of the experts that changed since the checkpoint before
  distinct_experts.csv   experts of each id that occurs often enough
  *.png                  plots of load, entropy, fluctuation, coactivation and distinct experts""",
    )
    models = parser.add_argument_group("models")
    models.add_argument(
        "--load",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders of Megatron checkpoints, which stand for all of them, single Megatron checkpoints, or models in "
        "transformers' format; a series in this order",
    )
    models.add_argument(
        "--ckpt-step", type=int, nargs="+", default=(), metavar="I", help="iterations to take of folders of checkpoints"
    )
    models.add_argument("--tokenizer-type", metavar="T", help="instead of the checkpoint's; NullTokenizer: none")
    models.add_argument("--tokenizer-model", metavar="F", help="instead of the checkpoint's")
    models.add_argument(
        "--scratch-dir", type=Path, metavar="DIR", help="where Megatron checkpoints are converted, one after the other"
    )

    probe = parser.add_argument_group("probe text")
    text = probe.add_mutually_exclusive_group(required=True)
    text.add_argument("--data-path", metavar="P", help="prefix of a dataset; P.bin and P.idx exist")
    text.add_argument(
        "--input", type=Path, nargs="+", metavar="F", help="text files (.jsonl, .txt, also .gz and .zst) to tokenize"
    )
    probe.add_argument("--split", metavar="A,B,C", help="Megatron's, of --data-path (default: all of it)")
    probe.add_argument(
        "--eval-split", choices=SPLITS, default="valid", help="which part of --split (default: %(default)s)"
    )
    probe.add_argument("--json-key", default="text", metavar="K", help="of the text in JSON lines (default: text)")
    probe.add_argument(
        "--tokens",
        type=int,
        default=_DEFAULTS.num_tokens,
        metavar="T",
        help="tokens that are used: windows from all over --data-path, the first of --input (default: %(default)s)",
    )
    probe.add_argument("--seq-length", type=int, metavar="S", help="tokens of a window (default: the model's)")
    probe.add_argument(
        "--batch-size",
        type=int,
        default=_DEFAULTS.batch_size,
        metavar="B",
        help="windows at a time (default: %(default)s)",
    )

    measures = parser.add_argument_group("what is measured")
    measures.add_argument(
        "--token-frequency",
        type=Path,
        metavar="F",
        help="counts made by tools/count_token_frequency.py, which define the frequency bands (default: the probe's)",
    )
    measures.add_argument(
        "--capacity-factors",
        type=float,
        nargs="+",
        default=_DEFAULTS.capacity_factors,
        metavar="C",
        help="for the share of dropped assignments (default: 1 1.25 1.5 2)",
    )
    measures.add_argument(
        "--micro-batch-tokens", type=int, metavar="T", help="tokens that share the capacity (default: those of a batch)"
    )
    measures.add_argument(
        "--min-occurrences",
        type=int,
        default=_DEFAULTS.min_occurrences,
        metavar="O",
        help="of an id in the probe, for its distinct experts to count (default: %(default)s)",
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
    return parser.parse_args()


def settings_from(arguments: argparse.Namespace) -> AnalysisSettings:
    return AnalysisSettings(
        num_tokens=arguments.tokens,
        seq_length=arguments.seq_length,
        batch_size=arguments.batch_size,
        capacity_factors=tuple(arguments.capacity_factors),
        micro_batch_tokens=arguments.micro_batch_tokens,
        min_occurrences=arguments.min_occurrences,
        num_top_ids=arguments.top_ids,
    )


def text_from(arguments: argparse.Namespace) -> ProbeText:
    """Where the tokens come from. Raises UserError where flags contradict each other."""
    if arguments.input is None:
        return DatasetText(arguments.data_path, arguments.split, arguments.eval_split)
    if arguments.split is not None:
        raise UserError("--split is of --data-path; --input is used from its beginning")
    return FileText(tuple(arguments.input), arguments.json_key)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """A folder to write to; a new one is removed again if there is nothing in it at the end.

    Raises:
        UserError: it cannot be made, or is not writable.
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
    arguments = parse_arguments()
    settings, text = settings_from(arguments), text_from(arguments)
    settings.check()
    conversion = Conversion(arguments.scratch_dir, arguments.tokenizer_type, arguments.tokenizer_model)
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    models = find_models(arguments.load, arguments.ckpt_step)
    with output_folder(arguments.output_dir) as folder, ExitStack() as traces:
        paths = [folder / f"trace_{number}.safetensors" for number in range(1, len(models) + 1)]

        def keep_trace(position: int, trace: RoutingTrace) -> None:
            if arguments.save_traces:
                trace.save(traces.enter_context(atomic_output(paths[position])))

        analysis = analyze(models, text, settings, frequency, conversion, keep_trace, progress=True)
        written = write_results(analysis, folder)
    print(*terminal_table(analysis), sep="\n")
    print()
    for path in [*written, *(paths if arguments.save_traces else ())]:
        print(f"written  {path}")
