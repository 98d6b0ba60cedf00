"""Builds MaskMoE's mask of the study: Hash's mask of the same seed, in which frequent ids see more experts.

The suites name this program as the program of their masks. It takes the flags of `maskmoe mask` that they
give. It also writes Hash's mask, as `narrow_mask.safetensors` beside the output: gated Hash needs it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from widen_routing_mask import widen_routing_mask

from maskmoe.arguments.commands import Parser
from maskmoe.processes.run_tool import run_tool
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.frequency import TokenFrequency

NARROW_MASK = "narrow_mask.safetensors"


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process."""
    parser = Parser(description=__doc__)
    for flag in ("--token-frequency", "--output"):
        parser.add_argument(flag, type=Path, required=True)
    for flag in ("--num-experts", "--num-layers", "--seed", "--frequent-visible-experts"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--frequent-mass", type=float, required=True)
    parser.add_argument("--preset", choices=["hash-balanced"], required=True)
    parser.add_argument("--force", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Build both masks."""
    arguments = parse_arguments()
    frequency = TokenFrequency.load(arguments.token_frequency)
    sizes = (arguments.num_experts, arguments.num_layers)
    recipe = MaskRecipe.from_preset(arguments.preset, *sizes, seed=arguments.seed)
    narrow = build_routing_mask(recipe, frequency=frequency)
    wide = widen_routing_mask(
        narrow,
        frequency=frequency,
        frequent_mass=arguments.frequent_mass,
        frequent_visible_experts=arguments.frequent_visible_experts,
        seed=arguments.seed,
    )
    narrow.save(arguments.output.with_name(NARROW_MASK))
    wide.save(arguments.output)


if __name__ == "__main__":
    run_tool(main)
