"""Build a routing mask: which experts each token id may use in each layer."""

import argparse
import math
from pathlib import Path

import numpy as np

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError
from maskmoe.routing_mask.assignment import ASSIGNMENTS, PRESETS, MaskRecipe
from maskmoe.routing_mask.expert_table import ExpertTable
from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask, build_routing_mask, expected_expert_load, overloading_ids


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"{__doc__} Frequent ids see several experts, all others one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python tools/build_routing_mask.py --token-frequency counts.safetensors --num-experts 64 --num-layers 24 \\
    --frequent-mass 0.4 --frequent-visible-experts 8 --assignment balanced --seed 1 --output mask.safetensors""",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--token-frequency", type=Path, metavar="F", help="counts from tools/count_token_frequency.py")
    source.add_argument(
        "--vocab-size", type=int, metavar="V", help="ids of the tokenizer, for masks that need no counts"
    )

    source.add_argument(
        "--expert-table",
        metavar="F[:TENSOR]",
        help="a table of every id's experts, [vocab, k] for all layers or [layers, vocab, k]: a .npy file, or a tensor "
        "of a safetensors file or of a folder of them. {layer} in TENSOR stands for a layer's number, with one "
        "[vocab, k] for each; in layers without, every id sees all experts. DeepSeek-V4's is "
        "FOLDER:model.layers.{layer}.mlp.gate.tid2eid",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--num-experts", type=int, required=True, metavar="N", help="experts in each MoE layer")
    model.add_argument("--num-layers", type=int, required=True, metavar="L", help="transformer layers, MoE or not")
    model.add_argument(
        "--expert-model-parallel-size",
        type=int,
        metavar="E",
        help="expert-parallel ranks; needed for rank-local assignment, otherwise only adds their load to the summary",
    )

    method = parser.add_argument_group("method")
    method.add_argument(
        "--frequent-mass",
        type=float,
        metavar="P",
        help="the most frequent ids that together make up this share (0 to 1) of all token occurrences are frequent",
    )
    method.add_argument(
        "--frequent-visible-experts", type=int, metavar="V_f", help="experts that each frequent id sees, 2 to N"
    )
    method.add_argument(
        "--assignment",
        choices=ASSIGNMENTS,
        help="uniform: drawn at random; balanced: by descending count onto the least-loaded experts; rank-local: as "
        "balanced, with all experts of an id on one expert-parallel rank",
    )
    method.add_argument(
        "--preset",
        choices=PRESETS,
        help="a baseline instead: smoe (every id sees all experts), hash (one, at random), hash-balanced (one, by "
        "count), top-k-hash (--frequent-visible-experts for every id)",
    )
    method.add_argument("--shared-table", action="store_true", help="one table for all layers instead of one for each")
    method.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the random choices (default: %(default)s)"
    )

    parser.add_argument("--output", type=Path, required=True, metavar="F", help="file to write, .safetensors")
    parser.add_argument("--workers", type=int, metavar="W", help="processes that work (default: all available cores)")
    return parser.parse_args()


def recipe_from(arguments: argparse.Namespace) -> MaskRecipe:
    """The recipe that the flags describe. Raises UserError where they contradict each other."""
    method = {name: getattr(arguments, name) for name in ("frequent_mass", "frequent_visible_experts", "assignment")}
    given = {name: value for name, value in method.items() if value is not None}
    common = {"seed": arguments.seed, "shared_table": arguments.shared_table}
    if arguments.assignment == "rank-local":
        if arguments.expert_model_parallel_size is None:
            raise UserError("--assignment rank-local needs --expert-model-parallel-size")
        common["expert_model_parallel_size"] = arguments.expert_model_parallel_size
    if arguments.preset:
        return MaskRecipe.from_preset(arguments.preset, arguments.num_experts, arguments.num_layers, **given, **common)
    needed = [name for name in method if name != "frequent_visible_experts" or arguments.frequent_mass != 0]
    if missing := [f"--{name.replace('_', '-')}" for name in needed if name not in given]:
        raise UserError(f"{', '.join(missing)} missing; give all of them, or a --preset")
    return MaskRecipe(arguments.num_experts, arguments.num_layers, **given, **common)


def mask_from_table(arguments: argparse.Namespace) -> RoutingMask:
    """The mask of `--expert-table`. Raises UserError where the table is unusable, or a flag says what it says."""
    flags = ("frequent_mass", "frequent_visible_experts", "assignment", "preset")
    given = [f"--{name.replace('_', '-')}" for name in flags if getattr(arguments, name) is not None]
    given += ["--shared-table"] if arguments.shared_table else []
    if given:
        raise UserError(f"--expert-table already decides what each id sees; leave {', '.join(given)} out")
    table = ExpertTable.read(arguments.expert_table, arguments.num_layers)
    repeats = table.num_ids_with_repeats
    if repeats:
        print(f"WARNING: {repeats:,} ids name an expert more than once; they see as many experts as are different")
    return table.to_mask(arguments.num_experts, arguments.num_layers)


def print_summary(mask: RoutingMask, frequency: TokenFrequency | None, num_ranks: int | None) -> None:
    num_visible = mask.num_visible
    is_frequent = num_visible > 1
    tables = "one table for all layers" if mask.is_shared else f"{mask.num_layers} tables"
    size = f"{mask.nbytes / 2**20:.2f} MiB"
    print(f"mask             {mask.vocab_size:,} ids · {mask.num_experts} experts · {tables} · {size}")
    sees = f", each sees {num_visible.max()} experts" if is_frequent.any() else ""
    print(f"frequent ids     {is_frequent.sum():,} of {mask.vocab_size:,}{sees}; every other sees 1")
    if frequency is not None:
        occurrences = frequency.occurrences
        load = expected_expert_load(mask, occurrences)
        print(f"frequent share   {occurrences[is_frequent].sum() / occurrences.sum():.2%} of all occurrences")
        print(f"expert load      {describe_imbalance(load)}")
        if num_ranks:
            print(f"rank load        {describe_imbalance(load.reshape(len(load), num_ranks, -1).sum(axis=2))}")
        warn_of_overload(mask, occurrences)
    print(f"digest           {mask.digest}")


def describe_imbalance(load: np.ndarray) -> str:
    """How uneven `load` `[tables, bins]` is."""
    imbalance = load.max(axis=1) / load.mean(axis=1)
    spread = f"{imbalance.min():.3f} / {np.median(imbalance):.3f} / {imbalance.max():.3f}"
    return f"expected max/mean {spread} (min / median / max over tables)"


def warn_of_overload(mask: RoutingMask, occurrences: np.ndarray) -> None:
    ids = overloading_ids(mask, occurrences)
    if not len(ids):
        return
    worst = ids[0]
    others = f" ({len(ids) - 1:,} more ids are too frequent as well)" if len(ids) > 1 else ""
    share, num_visible = occurrences[worst] / occurrences.sum(), mask.num_visible[worst]
    needed = max(2, math.ceil(share * mask.num_experts))
    num_ranks = mask.provenance.expert_model_parallel_size
    if num_ranks and share > 1 / num_ranks:
        cure = f"use fewer than {num_ranks} expert-parallel ranks, or another assignment"
    elif num_visible == 1:
        cure = f"make it frequent (a larger --frequent-mass) with --frequent-visible-experts of at least {needed}"
    else:
        cure = f"give frequent ids at least {needed} experts (--frequent-visible-experts)"
    print(
        f"WARNING: balance is impossible: id {worst} alone has {share:.2%} of all occurrences and sees {num_visible} "
        f"of {mask.num_experts} experts{others}; {cure}, or use fewer experts"
    )


def main() -> None:
    arguments = parse_arguments()
    recipe = None if arguments.expert_table else recipe_from(arguments)
    num_ranks = arguments.expert_model_parallel_size
    if num_ranks is not None and (num_ranks < 1 or arguments.num_experts % num_ranks):
        raise UserError(
            f"{arguments.num_experts} experts cannot be divided evenly over {num_ranks} expert-parallel ranks"
        )
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    with atomic_output(arguments.output) as temporary:
        if recipe is None:
            mask = mask_from_table(arguments)
        else:
            mask = build_routing_mask(
                recipe, frequency=frequency, vocab_size=arguments.vocab_size, workers=arguments.workers, progress=True
            )
        mask.save(temporary)
    print_summary(mask, frequency, num_ranks)
    print(f"written          {arguments.output}")
