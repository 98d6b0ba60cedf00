"""The suites in launch/suites/."""

from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.comparison.cost import describe_cost, flops_per_token, suite_cost
from maskmoe.comparison.data import open_data
from maskmoe.comparison.parts import identity_of, settings_of
from maskmoe.comparison.recording import num_exact_losses
from maskmoe.comparison.runs import check_runs, choose_learning_rates, training_flags, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.data.text_sources import TextSources
from maskmoe.errors import UserError
from maskmoe.training.preflight.assumed_gpu import AssumedGpu

TEXTS = sorted((ROOT / "launch" / "suites").glob("*-text.yaml"))
SUITES = sorted(set((ROOT / "launch" / "suites").glob("*.yaml")) - set(TEXTS))
GPU_SUITES = ("small", "large")
PER_LAYER_SUITES = ("per-layer",)
LIMITS_OF_FIXED_ROUTING = ("limit-one-visible", "limit-only-hash-layers")


@pytest.fixture(params=SUITES, ids=lambda path: path.stem)
def suite(request):
    return Suite.read(request.param, {})


def test_runs_are_unique_and_all_variants_are_among_them(suite):
    runs = (*check_runs(suite), *tuning_runs(suite), *whole_runs(suite, choose_learning_rates(suite, {})))
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert {run.variant.name for run in runs if run.kind == "whole"} == {
        variant.name for variant in suite.variants.values()
    }


def test_variants_are_trained_alike(suite):
    """Variants differ only in the flags of their experts."""
    own = {"ffn-hidden-size", "num-experts"}
    trained = [
        {name: words for name, words in variant.flags.items() if name not in own and not name.startswith("moe-")}
        for variant in suite.variants.values()
        if variant.role != "curve"
    ]
    assert all(flags == trained[0] for flags in trained)


@pytest.mark.parametrize("name", GPU_SUITES)
def test_suites_for_gpus_compare_the_variants_of_the_laptop_suite(name):
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    laptop = Suite.read(ROOT / "launch" / "suites" / "laptop.yaml", {})
    assert suite.baselines == laptop.baselines
    for variant in laptop.variants.values():
        if variant.role in ("main", "limit"):
            same = suite.variants[variant.name]
            assert (same.tuned_as, same.equals, same.until) == (variant.tuned_as, variant.equals, variant.until)


def test_routed_and_shared_experts_are_as_wide_as_the_dense_layer(suite):
    flags = ("moe-ffn-hidden-size", "moe-shared-expert-intermediate-size")
    (dense,) = next(iter(suite.variants.values())).flags["ffn-hidden-size"]
    for variant in suite.variants.values():
        if variant.mask is not None:
            widths = [int(width) for flag in flags for width in variant.flags.get(flag, ())]
            assert sum(widths) == int(dense), variant.name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_packages_of_a_text_are_those_that_pip_downloads(path):
    """Only wheels are downloaded, so pip runs no code of the packages."""
    sources = TextSources.read(path)
    lines = (path.parent / sources.requirements).read_text().splitlines()
    wheels = [f"{each.package}=={each.version} --hash=sha256:{each.sha256}" for each in sources.sources()]
    assert lines[0].startswith("#")
    assert lines[1:] == ["--only-binary :all:", *wheels]


def test_text_of_the_laptop_suite_has_two_domains_and_a_third_one_for_evaluation(tmp_path):
    suite = Suite.read(ROOT / "launch" / "suites" / "laptop.yaml", {})
    data = open_data(suite.data, tmp_path, suite.seq_length)
    assert [held_out.name for held_out in data.held_out] == ["prose", "code", "other"]


@pytest.mark.parametrize("name", [*GPU_SUITES, *PER_LAYER_SUITES])
def test_suites_for_gpus_keep_layouts_and_want_text(name, tmp_path):
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    for variant in suite.variants.values():
        size = {} if variant.mask is None else {"expert-model-parallel-size": ("8",)}
        if variant.name == "maskmoe-rank-local":
            size = {"expert-model-parallel-size": variant.mask["expert-model-parallel-size"]}
        assert variant.layouts.get(8, {}) == size
        assert variant.layouts.get(1, {}) == {}
    data = open_data(suite.data, tmp_path, 2048)
    for attribute in ("stages", "flags", "inputs", "folders"):
        with pytest.raises(UserError, match="the suite brings no text"):
            getattr(data, attribute)
    given = {"data-path": ("0.5", "data"), "split": ("99,1,0",), "tokenizer-model": ("model",)}
    data = open_data({**suite.data, **given}, tmp_path, 2048)
    assert data.flags["data-path"] == ("0.5", str(Path("data").absolute()))


@pytest.mark.parametrize("name", [*GPU_SUITES, *PER_LAYER_SUITES])
def test_fixed_routing_has_nothing_to_balance(name):
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    for variant in suite.variants.values():
        if variant.mask is not None:
            is_fixed = variant.name.startswith("hash") or variant.name in LIMITS_OF_FIXED_ROUTING
            is_fixed = is_fixed and not variant.name.startswith("hash-3-")
            expected = ("none",) if is_fixed else ("aux_loss",)
            assert variant.flags["moe-router-load-balancing-type"] == expected


def test_short_runs_warm_up_as_long_in_proportion(suite):
    run = (*tuning_runs(suite), *whole_runs(suite, choose_learning_rates(suite, {})))[0]
    assert "lr-warmup-fraction" in training_flags(suite, run)
    assert "lr-warmup-iters" not in training_flags(suite, run)


@pytest.mark.parametrize("name", [*GPU_SUITES, *PER_LAYER_SUITES])
def test_cost_of_suites_for_gpus(name):
    """A run trains on 100 billion tokens. Trials of learning rates are a quarter as long, and cost less."""
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    costs = {cost.kind: cost for cost in suite_cost(suite)}
    assert costs["runs"].tokens / costs["runs"].num_runs == pytest.approx(100e9, rel=1e-4)
    trials = costs["learning rates"]
    assert trials.tokens / trials.num_runs == pytest.approx(25e9, rel=1e-4)
    assert trials.flops < 0.25 * costs["runs"].flops
    assert costs["limits"].flops < 1e-3 * costs["runs"].flops
    runs = (*tuning_runs(suite), *whole_runs(suite, choose_learning_rates(suite, {})))
    assert sum(cost.num_runs for cost in costs.values()) == len(runs)
    *_, total, assumption = describe_cost(suite, AssumedGpu(peak_tflops=500, utilization=0.5))
    hours = sum(cost.flops for cost in costs.values()) / (250e12 * 3600)
    assert total.split()[:3] == ["cost", "all", str(len(runs))]
    assert total.endswith(f"{hours:,.0f} GPU-hours")
    assert "50% of 500 TFLOP/s" in assumption


def test_runs_of_small_are_not_trained_again_for_per_layer():
    """The tuning runs, and the whole runs of SMoE, Hash and MaskMoE, are equal, so the parts of `small` count."""
    runs = {}
    for name in ("small", "per-layer"):
        suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
        rates = dict.fromkeys(suite.variants, suite.learning_rates.values[0])
        runs[name] = {
            identity_of(run.kind, run.is_analyzed, settings_of(suite, run), {}): num_exact_losses(suite, run)
            for run in (*tuning_runs(suite), *whole_runs(suite, rates))
        }
    small, per_layer = runs.values()
    common = small.keys() & per_layer.keys()
    assert (len(common), len(per_layer)) == (21, 29)
    assert all(small[identity] >= per_layer[identity] for identity in common)


def test_cost_of_a_suite_for_a_laptop_is_not_stated():
    suite = Suite.read(ROOT / "launch" / "suites" / "laptop.yaml", {})
    assert not list(describe_cost(suite, AssumedGpu()))


def test_cost_follows_the_vocabulary():
    """Embedding and output layer share a matrix, which each token is multiplied with once."""
    suite = Suite.read(ROOT / "launch" / "suites" / "small.yaml", {})
    variant = suite.variants["maskmoe"]
    assert flops_per_token(variant, 64000) - flops_per_token(variant, 32000) == 6 * 768 * 32000
    assert flops_per_token(variant, 63900) == flops_per_token(variant, 64000)  # padded
    assert sum(cost.flops for cost in suite_cost(suite, 32000)) < sum(cost.flops for cost in suite_cost(suite))


@pytest.mark.parametrize("flag", ["hybrid-layer-pattern", "multi-latent-attention", "recompute-granularity"])
def test_cost_of_other_models_is_unknown(flag):
    suite = Suite.read(ROOT / "launch" / "suites" / "small.yaml", {})
    variant = suite.variants["maskmoe"]
    other = variant.model_copy(update={"flags": {**variant.flags, flag: ("x",)}})
    suite = suite.model_copy(update={"variants": {**suite.variants, "maskmoe": other}})
    assert flops_per_token(other, 64000) is None
    (line,) = describe_cost(suite, AssumedGpu())
    assert line.startswith("cost      unknown")


@pytest.mark.parametrize("name", PER_LAYER_SUITES)
def test_first_layers_are_hash_layers(name):
    """The masks of each suite: hash layers below, other layers as in the variant whose learning rate is used."""
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    for variant in suite.of_role("main"):
        if "hash-layers" in variant.mask:
            base = suite.variants[variant.tuned_as]
            assert {flag: words for flag, words in variant.mask.items() if flag != "hash-layers"} == base.mask
            assert 0 < int(variant.mask["hash-layers"][0]) < int(variant.flags["num-layers"][0])
            assert variant.flags == base.flags
