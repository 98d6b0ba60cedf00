r"""Widen a routing mask: let frequent ids see more experts, and keep every expert that an id sees.

Give a larger share P of frequent ids, a larger number V_f of experts that a frequent id sees, or both. The further
experts are chosen as the mask's were. A run that is under way continues with the wider mask if it is given
--change-routing-mask.

Example:
  %(prog)s --routing-mask mask.safetensors --token-frequency counts.safetensors \
    --frequent-visible-experts 16 --output wider.safetensors
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from maskmoe.arguments import ranges
from maskmoe.arguments.parser import add_force_argument, add_option, add_seed_argument, command_parser
from maskmoe.command_line.build_routing_mask import describe_imbalance, read_mask, warn_of_overload
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load
from maskmoe.routing_mask.mask import MaskChange, RoutingMask
from maskmoe.routing_mask.widening import widen_routing_mask


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line, by default that of the process."""
    parser = command_parser(__doc__)
    mask = "routing mask to widen: a file, a checkpoint, or the folder of a run's checkpoints"
    add_option(parser, "--routing-mask F", mask, Path, required=True)
    counts = "file of token counts; needed unless the mask is uniform and P does not grow"
    add_option(parser, "--token-frequency F", counts, Path)
    mass = "the most frequent ids that together make up this share (0 to 1) of all occurrences become frequent ids, in "
    mass += "addition to those that see several experts already (default: the mask's P)"
    add_option(parser, "--frequent-mass P", mass, ranges.SHARE)
    visible = "experts that each frequent id sees (default: the mask's V_f)"
    add_option(parser, "--frequent-visible-experts V_f", visible, ranges.EXPERTS)
    add_seed_argument(parser, "the random choices")
    add_option(parser, "--output F", "file to write, .safetensors", Path, required=True)
    add_force_argument(parser)
    return parser.parse_args(words)


def print_summary(old: RoutingMask, new: RoutingMask, frequency: TokenFrequency | None) -> None:
    """Print what changes from one mask to the other: sets, sizes of sets, and expected load."""
    change = MaskChange.between(old, new)
    print(f"changed sets     {change.num_changed:,} of {change.num_pairs:,} (id, layer) pairs")
    print(f"frequent ids     {_count_frequent(old):,} → {_count_frequent(new):,} of {new.vocab_size:,}")
    print(f"visible experts  {_mean_visible(old):.3f} → {_mean_visible(new):.3f} (mean over ids and layers), ", end="")
    print(f"{old.max_visible} → {new.max_visible} (largest)")
    if frequency is not None:
        topk = old.provenance.topk
        for name, mask in (("before", old), ("after", new)):
            load = expected_expert_load(mask, frequency.occurrences, topk)
            print(f"{'load ' + name:16} {describe_imbalance(load)} at top-{topk}")
            if num_ranks := mask.provenance.expert_model_parallel_size:
                print(f"{'  of ranks':16} {describe_imbalance(load, num_ranks)}")
        warn_of_overload(new, frequency.occurrences, topk)
    print(f"digest before    {old.digest}")
    print(f"digest           {new.digest}")


def _count_frequent(mask: RoutingMask) -> int:
    return int(np.count_nonzero(mask.num_visible_beyond_hash_layers > 1))


def _mean_visible(mask: RoutingMask) -> float:
    return float(np.mean([mask.num_visible_of_layer(table).mean() for table in range(len(mask.row_of_id))]))


def main() -> None:
    """Widen the mask, write the wider mask and print what changed."""
    arguments = parse_arguments()
    inputs = [path for path in (arguments.routing_mask, arguments.token_frequency) if path]
    check_outputs([arguments.output], inputs, arguments.force)
    mask = read_mask(arguments.routing_mask)
    frequency = TokenFrequency.load(arguments.token_frequency) if arguments.token_frequency else None
    with atomic_output(arguments.output) as temporary:
        wider = widen_routing_mask(
            mask,
            frequency=frequency,
            frequent_mass=arguments.frequent_mass,
            frequent_visible_experts=arguments.frequent_visible_experts,
            seed=arguments.seed,
            progress=True,
        )
        wider.save(temporary)
    print_summary(mask, wider, frequency)
    print(f"written          {arguments.output}")
