"""Results of a comparison that was never run: losses are known functions of variant, seed and band."""

import numpy as np

from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.results import (
    Band,
    Curve,
    LimitResult,
    Results,
    RoutingHistory,
    RunResult,
    VariantResult,
)

BANDS = {"top 40 %": 0.4, "next 50 %": 0.5, "last 10 %": 0.1}
EFFECTS = {"dense": 0.1, "smoe": 0.0, "hash-balanced": -0.05, "maskmoe": -0.08}
MASKS = {
    "dense": None,
    "smoe": {"preset": ["smoe"]},
    "hash-balanced": {"preset": ["hash-balanced"]},
    "maskmoe": {"frequent-mass": ["0.2"], "frequent-visible-experts": ["2"], "assignment": ["balanced"]},
}
ITERATIONS = [100, 200, 300, 400]


def synthetic_results(seeds=(1, 2, 3), noise=0.004):
    """Return results of variants that differ by `EFFECTS`, by a common effect of the seed, and by noise."""
    rng = np.random.default_rng(0)
    variants = [
        VariantResult(
            name, name.capitalize(), "main", mask, Parameters(2000, 1000), "4e-3", {"2e-3": 2.5, "4e-3": 2.4}, 1000
        )
        for name, mask in MASKS.items()
    ]
    runs = [
        _run(name, seed, EFFECTS[name], 0.02 * seed + noise * rng.normal(), rng) for name in MASKS for seed in seeds
    ]
    for mass in ("0.1", "0.4"):
        mask = MASKS["maskmoe"] | {"frequent-mass": [mass]}
        name = f"maskmoe.p{mass}-v2"
        variants.append(VariantResult(name, name, "grid", mask, None, "4e-3", {}, 1000))
        runs.append(_run(name, 1, -0.06, 0.02, rng))
    return Results(
        title="A synthetic comparison",
        command="launch/compare.sh suite.yaml",
        machine="2 cores",
        baselines=["smoe", "hash-balanced"],
        variants=variants,
        runs=runs,
        limits=[LimitResult("All visible", "smoe", 1, 20, 20), LimitResult("One visible", "hash-balanced", 1, 20, 19)],
        unfinished=[],
    )


def _run(name, seed, effect, shift, rng):
    loss = 2.3 + effect + shift
    losses = [loss + 1.0 / (1 + i) for i in range(len(ITERATIONS))]
    return RunResult(
        variant=name,
        seed=seed,
        seconds=100.0,
        training=Curve(ITERATIONS, losses),
        validation=Curve(ITERATIONS, losses),
        loss=loss,
        bands=[
            Band(band, share, loss + 0.3 * index + index * effect) for index, (band, share) in enumerate(BANDS.items())
        ],
        load=[] if name == "dense" else rng.integers(800, 1200, size=(3, 8)).tolist(),
        routing=None if name == "dense" else _routing(has_choice=not name.startswith("hash"), rng=rng),
    )


def _routing(has_choice, rng):
    """Return the routing of two layers."""
    no_values = [[None, None]] * len(ITERATIONS)
    shares = rng.random((len(ITERATIONS), 2)).tolist()
    return RoutingHistory(
        layers=[1, 2],
        iterations=ITERATIONS,
        entropy=shares if has_choice else no_values,
        fluctuation=shares[1:] if has_choice else [[0.0, 0.0]] * (len(ITERATIONS) - 1),
        routable_fluctuation=shares[1:] if has_choice else no_values[1:],
        single_expert_token_share=[0.6, 0.6] if has_choice else [1.0, 1.0],
        id_information=[1.0, 1.0],
        distinct_experts={band: [2.0, 1.5] for band in BANDS},
    )
