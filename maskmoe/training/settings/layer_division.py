"""Judges whether the layers of a model can be divided among pipeline stages."""

from argparse import Namespace
from collections.abc import Iterator
from math import isqrt

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, get_hybrid_total_pipeline_segment_count


def layer_errors(args: Namespace) -> Iterator[str]:
    """Yield an error if the layers cannot be divided among the pipeline stages, with what would fit.

    Args:
        args: parsed arguments; Megatron need not have validated them.
    """
    yield from _errors_of_number(args) if args.hybrid_layer_pattern is None else _errors_of_segments(args)


def _errors_of_number(args: Namespace) -> Iterator[str]:
    """Yield an error if `--num-layers` cannot be divided evenly.

    A run that asks for stages of different length has no such errors.
    """
    stages, layers = args.pipeline_model_parallel_size, args.num_layers
    is_uneven = (
        args.decoder_first_pipeline_num_layers
        or args.decoder_last_pipeline_num_layers
        or args.pipeline_model_parallel_layout
        or args.account_for_embedding_in_pipeline_split
        or args.account_for_loss_in_pipeline_split
    )
    if not layers or is_uneven:
        return
    layers_of_stage, chunk = layers // stages, args.num_layers_per_virtual_pipeline_stage
    if layers % stages:
        yield (
            f"--num-layers {layers} is not divisible by --pipeline-model-parallel-size {stages}: {divisors(layers)} "
            "would fit, or stages of different length by --decoder-first-pipeline-num-layers, "
            "--decoder-last-pipeline-num-layers or --pipeline-model-parallel-layout"
        )
    elif chunk and layers_of_stage % chunk:
        yield (
            f"the {layers_of_stage} layers of a pipeline stage are not divisible by "
            f"--num-layers-per-virtual-pipeline-stage {chunk}: {divisors(layers_of_stage)} would fit"
        )


def _errors_of_segments(args: Namespace) -> Iterator[str]:
    """Yield an error if the layers of `--hybrid-layer-pattern` cannot be divided.

    `|` divides the pattern into model chunks. Without `|`, Megatron divides the layers evenly between the first stage
    and the last stage, which can have numbers of their own.
    """
    stages, segments = args.pipeline_model_parallel_size, num_segments(args)
    decoder = args.hybrid_layer_pattern.partition(Symbols.MTP_SEPARATOR)[0]
    layers = len(decoder.replace(Symbols.PIPE, ""))
    if segments > 1:
        if stages == 1:
            yield (
                f"--hybrid-layer-pattern is divided into {segments} model chunks, but --pipeline-model-parallel-size "
                "is 1: leave | out of the pattern, or use more pipeline stages"
            )
        elif segments % stages:
            yield (
                f"--hybrid-layer-pattern is divided into {segments} model chunks, which "
                f"--pipeline-model-parallel-size {stages} does not divide: {divisors(segments)} would fit, or another "
                "number of |"
            )
        return
    of_ends = [args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers]
    given = [number for number in of_ends if number is not None]
    layers, stages = layers - sum(given), stages - len(given)
    if layers < 0 or (layers % stages if stages > 0 else layers):
        remaining = "remaining " if given else ""
        yield (
            f"the {remaining}{max(layers, 0)} layers of --hybrid-layer-pattern cannot be divided evenly among {stages} "
            "pipeline stages: write | between the layers of neighbouring stages"
        )


def num_segments(args: Namespace) -> int:
    """Return the number of model chunks into which `--hybrid-layer-pattern` is divided; 1 without a pattern."""
    return get_hybrid_total_pipeline_segment_count(args.hybrid_layer_pattern or "")


def divisors(number: int) -> str:
    """Return the divisors of a number in ascending order, as text for messages: `1, 2, 4`."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return ", ".join(map(str, sorted({*small, *(number // size for size in small)})))
