"""Results of a comparison that was never run: losses are known functions of variant, seed and band."""

import numpy as np

from maskmoe.comparison.fairness import Parameters
from maskmoe.comparison.parts import Origin, Part, settings_of
from maskmoe.comparison.results import CurvePoint, CurveResult, LimitResult, Results, VariantResult
from maskmoe.comparison.run_results import Band, Curve, Evaluation, HeldOut, RoutingHistory, RunResult
from maskmoe.comparison.runs import tuning_runs, whole_runs

BANDS = {"top 40 %": 0.4, "next 50 %": 0.5, "last 10 %": 0.1}
EFFECTS = {"dense": 0.1, "smoe": 0.0, "hash-balanced": -0.05, "maskmoe": -0.08}
MASKS = {
    "dense": None,
    "smoe": {"preset": ("smoe",)},
    "hash-balanced": {"preset": ("hash-balanced",)},
    "maskmoe": {"frequent-mass": ("0.2",), "frequent-visible-experts": ("2",), "assignment": ("balanced",)},
}
ITERATIONS = [100, 200, 300, 400]


def synthetic_results(seeds=(1, 2, 3), noise=0.004):
    """Return results of variants that differ by `EFFECTS`, by a common effect of the seed, and by noise.

    The losses of a further held-out text, `stories`, differ by twice the effects.
    """
    rng = np.random.default_rng(0)
    variants = [
        _variant(name, name.capitalize(), "main", mask, Parameters(total=2000, active=1000), {"2e-3": 2.5, "4e-3": 2.4})
        for name, mask in MASKS.items()
    ]
    runs = [
        _run(name, seed, EFFECTS[name], 0.02 * seed + noise * rng.normal(), rng) for name in MASKS for seed in seeds
    ]
    for mass in ("0.1", "0.4"):
        mask = MASKS["maskmoe"] | {"frequent-mass": (mass,)}
        name = f"maskmoe.p{mass}-v2"
        variants.append(_variant(name, name, "grid", mask, None, {}))
        runs.append(_run(name, 1, -0.06, 0.02, rng))
    # At 50, the method is worse than SMoE by 0.02, and in the main setting better.
    for name, effect in {"smoe": 0.0, "hash-balanced": 0.01, "maskmoe": 0.02}.items():
        point = f"{name}.size-50"
        variants.append(_variant(point, point, "curve", MASKS[name], None, {}))
        runs += [_run(point, seed, effect, 0.02 * seed + noise * rng.normal(), rng) for seed in seeds]
    methods = ["smoe", "hash-balanced", "maskmoe"]
    points = [
        CurvePoint(value=50, variants={name: f"{name}.size-50" for name in methods}),
        CurvePoint(value=100, variants={name: name for name in methods}),
    ]
    return Results(
        title="A synthetic comparison",
        command="launch/compare.sh suite.yaml",
        machine="2 cores",
        baselines=["smoe", "hash-balanced"],
        method="maskmoe",
        curves=[CurveResult(name="size", title="size of something", points=points)],
        variants=variants,
        runs=runs,
        training_seconds=[run.seconds for run in runs],
        limits=[
            LimitResult(title="All visible", equals="smoe", seed=1, iterations=20, num_equal=20),
            LimitResult(title="One visible", equals="hash-balanced", seed=1, iterations=20, num_equal=19),
        ],
        unfinished={},
        grid_of="maskmoe",
    )


def _variant(name, title, role, mask, parameters, tuning):
    settings = {
        "parameters": parameters,
        "learning_rate": "4e-3",
        "rate_factor": 1,
        "tuning": tuning,
        "tokens": 1000,
        "tokens_per_iteration": 10_000,
    }
    return VariantResult(name=name, title=title, role=role, mask=mask, **settings)


def _run(name, seed, effect, shift, rng):
    loss = 2.3 + effect + shift
    losses = [loss + 1.0 / (1 + i) for i in range(len(ITERATIONS))]
    return RunResult(
        variant=name,
        seed=seed,
        seconds=100.0,
        training=Curve(iterations=ITERATIONS, losses=losses),
        validation=Curve(iterations=ITERATIONS, losses=losses),
        loss=loss,
        bands=_bands(loss, effect),
        further={"stories": HeldOut(loss=loss + 1 + effect, bands=_bands(loss + 1, effect))},
        load=[] if name == "dense" else rng.integers(800, 1200, size=(3, 8)).tolist(),
        routing=None if name == "dense" else _routing(has_choice=not name.startswith("hash"), rng=rng),
    )


def _bands(loss, effect):
    return [
        Band(name=band, share=share, loss=loss + 0.3 * index + index * effect)
        for index, (band, share) in enumerate(BANDS.items())
    ]


def _routing(has_choice, rng):
    """Return the routing of two layers."""
    no_values = [[None, None]] * len(ITERATIONS)
    shares = rng.random((len(ITERATIONS), 2)).tolist()
    return RoutingHistory(
        layers=[1, 2],
        iterations=ITERATIONS,
        entropy=shares if has_choice else no_values,
        first_weight=shares if has_choice else no_values,
        fluctuation=shares[1:] if has_choice else [[0.0, 0.0]] * (len(ITERATIONS) - 1),
        routable_fluctuation=shares[1:] if has_choice else no_values[1:],
        single_expert_token_share=[0.6, 0.6] if has_choice else [1.0, 1.0],
        id_information=[1.0, 1.0],
        distinct_experts={band: [2.0, 1.5] for band in BANDS},
    )


BEST_RATE = "1e-2"
TEXT = {"split": "9,1,0", "dataset.bin": "ab" * 32, "tokenizer": "cd" * 32}


def synthetic_part(suite, run, **changes):
    """Return the part of a run of a suite; tuning runs favour `BEST_RATE`, and limits reproduce what they must."""
    effect = EFFECTS.get(run.variant.name, -0.06)
    loss = 2.3 + effect + 0.02 * run.seed + (float(run.learning_rate) != float(BEST_RATE))
    losses = [loss + 1.0 / (1 + i) for i in range(len(ITERATIONS))]
    rng = np.random.default_rng(run.seed)
    routing = _routing(has_choice=True, rng=rng) if run.variant.has_experts else None
    evaluation = Evaluation(
        loss=loss,
        bands=_bands(loss, effect),
        load=rng.integers(800, 1200, size=(2, 4)).tolist() if routing else [],
        routing=routing,
        further={"stories": HeldOut(loss=loss + 1 + effect, bands=_bands(loss + 1, effect))},
    )
    content = {
        "suite": suite.name,
        "run": run.name,
        "kind": run.kind,
        "variant": run.variant.name,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "settings": settings_of(suite, run),
        "text": TEXT,
        "mask_digest": "ef" * 32 if run.variant.has_experts else None,
        "parameters": Parameters(total=2000, active=1000),
        "origin": Origin(
            commit="0123456789abcdef",
            is_dirty=False,
            packages={"torch": "2.15.0"},
            processor="a",
            num_cores=2,
            num_gpus=0,
        ),
        "seconds": 100.0,
        "tokens_per_second": 1000.0,
        "training": Curve(iterations=ITERATIONS, losses=losses),
        "validation": Curve(iterations=ITERATIONS, losses=losses),
        "exact_losses": Curve(iterations=[1, 2], losses=[float(np.float32(5.1)), float(np.float32(4.9))]),
        "evaluation": evaluation if run.is_analyzed else None,
    }
    return Part(**(content | changes))


def runs_of(suite):
    """Return all runs of a suite that have parts, with the learning rates that the synthetic parts favour."""
    rates = dict.fromkeys(suite.variants, BEST_RATE)
    return (*tuning_runs(suite), *whole_runs(suite, rates))


def write_parts(suite, folder, runs=None):
    """Write synthetic parts of the runs, by default of all runs of the suite, into a folder."""
    for run in runs_of(suite) if runs is None else runs:
        synthetic_part(suite, run).write(folder / f"{run.name}.json")
