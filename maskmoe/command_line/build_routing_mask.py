r"""Build a routing mask: the experts that each token id may use (its "visible" experts) in each layer.

The most frequent ids, which together make up a share P of all occurrences, see V_f experts each. Every other id sees
one expert. The mask is fixed before training.

Example:
  %(prog)s --token-frequency counts.safetensors --num-experts 64 --num-layers 24 \
    --frequent-mass 0.4 --frequent-visible-experts 8 --assignment balanced --seed 1 --output mask.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.errors import UserError, counted
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output
from maskmoe.routing_mask.assignment import ASSIGNMENTS, PRESETS, MaskRecipe, build_routing_mask
from maskmoe.routing_mask.expert_table import TENSOR_NAMES, ExpertTable, positions_of_layers, split_location
from maskmoe.routing_mask.frequency import (
    TokenFrequency,
    check_same_vocabulary,
    expected_expert_load,
    heaviest_shares,
    overloading_ids,
)
from maskmoe.routing_mask.mask import HashLayers, RoutingMask, describe_visible_experts

_MODEL = ("num_experts", "num_layers")
_HASH_LAYERS = ("hash_layers", "hash_visible_experts", "hash_assignment")
_METHOD = ("frequent_mass", "frequent_visible_experts", "assignment")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = command_parser(__doc__)
    source = parser.add_argument_group("vocabulary and experts (give one or more)")
    vocabulary = source.add_mutually_exclusive_group()
    add_option(vocabulary, "--token-frequency F", "file of token counts, counted in the training data", Path)
    size = "number of ids of the tokenizer, for masks that need no counts"
    add_option(vocabulary, "--vocab-size V", size, ranges.VOCAB_SIZE)
    experts = source.add_mutually_exclusive_group()
    experts.add_argument(
        "--expert-table",
        metavar="F[:TENSOR]",
        help="a table that already names the experts of every id: a .npy file or a tensor of a safetensors file, of "
        "shape [vocab, k] for all layers or [layers, vocab, k]; or a safetensors file or a folder of such files with a "
        "tensor [vocab, k] for each hash layer, named as in Megatron-Core, DeepSeek-V4 or transformers; or a "
        "checkpoint of Megatron-LM with hash layers. In layers without a tensor every id sees all experts. Rows beyond "
        "the vocabulary are padding",
    )
    mask = "write this mask: a file, a checkpoint, or the folder of a run's checkpoints"
    add_option(experts, "--routing-mask F", mask, Path)

    model = parser.add_argument_group("model (needed without --routing-mask)")
    add_option(model, "--num-experts N", "experts in each MoE layer", ranges.EXPERTS)
    add_option(model, "--num-layers L", "transformer layers, with and without experts", ranges.LAYERS)
    topk = "k of the router, for which the load is balanced and printed (default: 1)"
    add_option(model, "--moe-router-topk K", topk, ranges.EXPERTS)
    size = "number of expert-parallel ranks; required for rank-local assignment, otherwise it only adds the load of "
    add_option(model, "--expert-model-parallel-size E", f"{size}the ranks to the summary", ranges.RANKS)
    pattern = "layers of a HybridModel, for the numbers of layers in the tensors' names of tid2eid tables"
    add_option(model, "--hybrid-layer-pattern P", pattern)

    method = parser.add_argument_group("method")
    mass = "the most frequent ids that together make up this share (0 to 1) of all occurrences are the frequent ids"
    add_option(method, "--frequent-mass P", mass, ranges.SHARE)
    add_option(method, "--frequent-visible-experts V_f", "experts that each frequent id sees, 2 to N", ranges.EXPERTS)
    method.add_argument(
        "--assignment",
        choices=ASSIGNMENTS,
        help="uniform: experts are drawn at random; balanced: ids are placed by descending count on the least-loaded "
        "experts; rank-local: like balanced, but all experts of an id are on one expert-parallel rank",
    )
    method.add_argument(
        "--preset",
        choices=PRESETS,
        help="build a baseline: smoe (every id sees all experts), hash (every id sees one random expert), "
        "hash-balanced (every id sees one expert, placed by count), top-k-hash (every id sees "
        "--frequent-visible-experts experts)",
    )
    first = "the first L transformer layers are hash layers: every id sees equally many experts there, and the other "
    add_option(method, "--hash-layers L", f"{first}flags apply to the other layers only; 0: none", ranges.NUMBER)
    number = "experts that every id sees in a hash layer; with k of them, the table picks the k experts and the router "
    add_option(method, "--hash-visible-experts V", f"{number}only weights them (default: 1)", ranges.EXPERTS)
    chosen = "how the experts of hash layers are chosen (default: rank-local with --assignment rank-local, else "
    add_option(method, "--hash-assignment", f"{chosen}balanced)", choices=ASSIGNMENTS)
    method.add_argument("--shared-table", action="store_true", help="use the same table in all layers")
    add_seed_argument(method, "the random choices")
    add_option(parser, "--output F", "file to write, .safetensors", Path, required=True)
    kind = "mask: a routing mask; tid2eid, tid2eid-deepseek: int32 [vocab, k] for each layer in which every id sees k "
    kind += "experts, with the names of Megatron-Core or of DeepSeek-V4"
    add_option(parser, "--format", kind, choices=("mask", *TENSOR_NAMES), default="mask")
    add_force_argument(parser)
    arguments = parser.parse_args()
    if arguments.routing_mask:
        decided = (*_MODEL, "vocab_size", "shared_table", *_METHOD, "preset", *_HASH_LAYERS)
        _refuse(arguments, decided, "--routing-mask already decides the model and the experts of each id")
        return arguments
    if missing := [name for name in _MODEL if getattr(arguments, name) is None]:
        raise UserError(f"{_flags(missing)} missing")
    if not (arguments.token_frequency or arguments.vocab_size or arguments.expert_table):
        raise UserError("give --token-frequency, --vocab-size, --expert-table or --routing-mask")
    if arguments.expert_table:
        decided = (*_METHOD, "preset", *_HASH_LAYERS, "shared_table")
        _refuse(arguments, decided, "--expert-table already decides the experts of each id")
    return arguments


def recipe_from(arguments: argparse.Namespace) -> MaskRecipe:
    """Return the recipe that the flags describe.

    Raises:
        UserError: Flags are missing or contradict each other.
    """
    is_rank_local = arguments.assignment == "rank-local"
    settings: dict[str, Any] = {
        "seed": arguments.seed,
        "shared_table": arguments.shared_table,
        "topk": arguments.moe_router_topk or 1,
        "expert_model_parallel_size": arguments.expert_model_parallel_size if is_rank_local else None,
    }
    settings |= {name: value for name in _METHOD if (value := getattr(arguments, name)) is not None}
    if arguments.hash_layers:
        assignment = arguments.hash_assignment or ("rank-local" if is_rank_local else "balanced")
        visible = 1 if arguments.hash_visible_experts is None else arguments.hash_visible_experts
        settings["hash_layers"] = HashLayers(arguments.hash_layers, visible, assignment)
    elif arguments.hash_layers is None and (hashed := [name for name in _HASH_LAYERS if getattr(arguments, name)]):
        raise UserError(f"{_flags(hashed)} without --hash-layers")
    if arguments.preset:
        return MaskRecipe.from_preset(arguments.preset, arguments.num_experts, arguments.num_layers, **settings)
    if missing := [name for name in ("frequent_mass", "assignment") if name not in settings]:
        raise UserError(f"{_flags(missing)} missing; give a --preset, or --frequent-mass and --assignment")
    return MaskRecipe(arguments.num_experts, arguments.num_layers, **settings)


def _refuse(arguments: argparse.Namespace, names: Sequence[str], reason: str) -> None:
    """Raise a `UserError` with a reason if any of the flags was given."""
    # `0` and `0.0` were given, but equal False.
    if given := [name for name in names if not (getattr(arguments, name) is None or getattr(arguments, name) is False)]:
        raise UserError(f"{reason}; leave {_flags(given)} out")


def read_mask(source: Path) -> RoutingMask:
    """Read a routing mask from a file or a checkpoint.

    Raises:
        UserError: The source is missing or damaged, or holds no routing mask.
    """
    if not source.is_dir():
        return RoutingMask.load(source)
    # Only checkpoints need torch and Megatron, whose import takes seconds.
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.checkpoint.read_routing_mask import read_routing_mask

    return read_routing_mask(source)


def _read_table_of_checkpoint(folder: Path, num_layers: int, pattern: str | None) -> ExpertTable:
    """Read the table of Megatron-Core's hash layers from a checkpoint. Raises UserError."""
    from maskmoe.megatron_compat import prepare_process

    prepare_process()
    from maskmoe.checkpoint.expert_tables import read_expert_tables

    return ExpertTable.of_tensors(folder.name, read_expert_tables(folder), positions_of_layers(pattern, num_layers))


def _make_mask(arguments: argparse.Namespace, frequency: TokenFrequency | None) -> RoutingMask:
    """Return the mask that the flags describe: a given mask, the mask of a table, or a new mask.

    Raises:
        UserError: An input cannot be used, or flags contradict each other.
    """
    if arguments.routing_mask:
        return read_mask(arguments.routing_mask)
    if not arguments.expert_table:
        source = {"frequency": frequency, "vocab_size": arguments.vocab_size}
        return build_routing_mask(recipe_from(arguments), **source, progress=True)
    folder = Path(arguments.expert_table)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        table = _read_table_of_checkpoint(folder, arguments.num_layers, arguments.hybrid_layer_pattern)
    else:
        table = ExpertTable.read(arguments.expert_table, arguments.num_layers, arguments.hybrid_layer_pattern)
    vocab_size = frequency.vocab_size if frequency else arguments.vocab_size
    return table.to_mask(arguments.num_experts, arguments.num_layers, vocab_size)


def _inputs(arguments: argparse.Namespace) -> list[Path]:
    """Return the files and folders that the command reads."""
    table = arguments.expert_table and split_location(arguments.expert_table)[0]
    return [path for path in (arguments.token_frequency, table, arguments.routing_mask) if path]


def _flags(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def print_summary(mask: RoutingMask, frequency: TokenFrequency | None, num_ranks: int | None, topk: int) -> None:
    """Print size, visible experts, expected load and digest of the mask, and a warning if it cannot be balanced."""
    is_frequent = mask.num_visible_of_layer(mask.num_layers - 1) > 1  # beyond hash layers
    tables = "one table for all layers" if mask.is_shared else f"{mask.num_layers} tables"
    size = f"{mask.nbytes / 2**20:.2f} MiB"
    print(f"mask             {mask.vocab_size:,} ids · {mask.num_experts} experts · {tables} · {size}")
    print(f"visible experts  {describe_visible_experts(mask)}")
    if frequency is not None:
        occurrences = frequency.occurrences
        load = expected_expert_load(mask, occurrences, topk)
        if is_frequent.any() and not is_frequent.all():
            print(f"frequent share   {occurrences[is_frequent].sum() / occurrences.sum():.2%} of all occurrences")
        print(f"expert load      {describe_imbalance(load)} at top-{topk}")
        if num_ranks:
            print(f"rank load        {describe_imbalance(load, num_ranks)}")
        warn_of_overload(mask, occurrences, topk)
    print(f"digest           {mask.digest}")


def describe_imbalance(load: np.ndarray, num_ranks: int | None = None) -> str:
    """Return a text with maximum over mean of the load, over all tables.

    Args:
        load: The load of each expert, `[tables, N]`.
        num_ranks: Number of ranks, of which each has an equal share of consecutive experts. The text is then about the
            load of the ranks.
    """
    if num_ranks is not None:
        load = load.reshape(len(load), num_ranks, -1).sum(axis=2)
    imbalance = load.max(axis=1) / load.mean(axis=1)
    spread = f"{imbalance.min():.3f} / {np.median(imbalance):.3f} / {imbalance.max():.3f}"
    return f"expected max/mean {spread} (min / median / max over tables)"


def warn_of_overload(mask: RoutingMask, occurrences: np.ndarray, topk: int) -> None:
    """Print a warning if single ids are too frequent for a balanced load."""
    shares, visible = heaviest_shares(mask, occurrences, topk)
    ids = overloading_ids(mask, shares, visible)
    if not len(ids):
        return
    worst = ids[0]
    others = f" ({len(ids) - 1:,} more ids are too frequent as well)" if len(ids) > 1 else ""
    print(
        f"WARNING: balance is impossible: id {worst} alone has {shares[worst]:.2%} of the load and sees "
        f"{visible[worst]} of {mask.num_experts} experts{others}; let it see more experts (--frequent-mass, "
        "--frequent-visible-experts, --hash-visible-experts), or use fewer experts, or fewer ranks if rank-local"
    )


def main() -> None:
    """Build the mask, write it and print a summary."""
    arguments = parse_arguments()
    num_ranks = arguments.expert_model_parallel_size
    check_outputs([arguments.output], _inputs(arguments), arguments.force)
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    with atomic_output(arguments.output) as temporary:
        mask = _make_mask(arguments, frequency)
        if frequency:
            check_same_vocabulary(frequency, mask)
        if num_ranks is not None and mask.num_experts % num_ranks:
            raise UserError(f"{mask.num_experts} experts cannot be divided over {num_ranks} expert-parallel ranks")
        if arguments.format == "mask":
            tensors = []
            mask.save(temporary)
        else:
            names = TENSOR_NAMES[arguments.format]
            positions = positions_of_layers(arguments.hybrid_layer_pattern, mask.num_layers, [names])
            tensors = ExpertTable.of_mask(mask).save(temporary, names, positions)
    print_summary(mask, frequency, num_ranks, arguments.moe_router_topk or mask.provenance.topk)
    if tensors:
        print(f"tensors          {counted(len(tensors), 'tensor')}, the first is {tensors[0]}")
    print(f"written          {arguments.output}")
