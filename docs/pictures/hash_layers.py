"""Draw the load of experts and ranks under four tables of hash layers, for the token counts of a text.

python docs/pictures/hash_layers.py --token-frequency counts.safetensors --output docs/pictures/hash_layers.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask
from maskmoe.routing_mask.expert_table import ExpertTable
from maskmoe.routing_mask.frequency import TokenFrequency, expected_expert_load
from maskmoe.routing_mask.mask import RoutingMask

NUM_EXPERTS, TOPK, NUM_RANKS = 64, 2, 8


def masks(frequency: TokenFrequency) -> dict[str, RoutingMask]:
    """Return the mask of each table by its name, for one layer."""
    round_robin = (np.arange(frequency.vocab_size)[:, None] + np.arange(TOPK)) % NUM_EXPERTS
    found = {"round robin": ExpertTable("round robin", [round_robin]).to_mask(NUM_EXPERTS, 1)}
    for assignment in ("uniform", "balanced", "rank-local"):
        recipe = MaskRecipe.from_preset(
            "top-k-hash",
            NUM_EXPERTS,
            1,
            assignment=assignment,
            frequent_visible_experts=TOPK,
            expert_model_parallel_size=NUM_RANKS if assignment == "rank-local" else None,
        )
        found[assignment] = build_routing_mask(recipe, frequency=frequency)
    return found


def draw(frequency: TokenFrequency) -> Figure:
    """Draw the load over the mean of all experts, and of all ranks, in descending order."""
    figure = Figure((10, 4), dpi=130, layout="constrained")
    of_experts, of_ranks = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for name, mask in masks(frequency).items():
        (load,) = expected_expert_load(mask, frequency.occurrences, topk=TOPK)
        for axes, loads in ((of_experts, load), (of_ranks, load.reshape(NUM_RANKS, -1).sum(axis=1))):
            over_mean = np.sort(loads)[::-1] / loads.mean()
            axes.plot(np.arange(1, len(loads) + 1), over_mean, ".-", label=f"{name}: {over_mean[0]:.2f}")
    for axes, places in ((of_experts, f"{NUM_EXPERTS} experts"), (of_ranks, f"{NUM_RANKS} expert-parallel ranks")):
        axes.set(title=f"Load of the {places}", xlabel="busiest first", ylabel="load over the mean")
        axes.set_ylim(0)
        axes.grid(alpha=0.4)
        axes.label_outer()
        axes.legend(title="busiest", fontsize="small")
    return figure


def main() -> None:
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token-frequency", type=Path, required=True, help="file of token counts")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write")
    arguments = parser.parse_args()
    draw(TokenFrequency.load(arguments.token_frequency)).savefig(arguments.output, metadata={"Software": None})


if __name__ == "__main__":
    main()
