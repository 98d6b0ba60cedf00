"""The suites in launch/suites/."""

from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.comparison.data import open_data
from maskmoe.comparison.runs import check_runs, choose_learning_rates, training_flags, tuning_runs, whole_runs
from maskmoe.comparison.suite import Suite
from maskmoe.data.text_sources import TextSources
from maskmoe.errors import UserError

TEXTS = sorted((ROOT / "launch" / "suites").glob("*-text.yaml"))
SUITES = sorted(set((ROOT / "launch" / "suites").glob("*.yaml")) - set(TEXTS))
GPU_SUITES = ("small", "large")


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
    ]
    assert all(flags == trained[0] for flags in trained)


def test_all_suites_compare_the_same_variants(suite):
    laptop = Suite.read(ROOT / "launch" / "suites" / "laptop.yaml", {})
    for role in ("main", "limit"):
        assert [v.name for v in suite.of_role(role)] == [v.name for v in laptop.of_role(role)]
    assert suite.baselines == laptop.baselines
    assert {v.name: (v.tuned_as, v.equals, v.until) for v in suite.variants.values() if v.role != "grid"} == {
        v.name: (v.tuned_as, v.equals, v.until) for v in laptop.variants.values() if v.role != "grid"
    }


def test_routed_and_shared_experts_are_as_wide_as_the_dense_layer(suite):
    flags = ("moe-ffn-hidden-size", "moe-shared-expert-intermediate-size")
    (dense,) = suite.variants["dense"].flags["ffn-hidden-size"]
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


@pytest.mark.parametrize("name", GPU_SUITES)
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


@pytest.mark.parametrize("name", GPU_SUITES)
def test_fixed_routing_has_nothing_to_balance(name):
    suite = Suite.read(ROOT / "launch" / "suites" / f"{name}.yaml", {})
    for variant in suite.variants.values():
        if variant.mask is not None:
            is_fixed = "hash" in variant.name or variant.name == "limit-one-visible"
            expected = ("none",) if is_fixed else ("aux_loss",)
            assert variant.flags["moe-router-load-balancing-type"] == expected


def test_short_runs_warm_up_as_long_in_proportion(suite):
    run = tuning_runs(suite)[0]
    assert "lr-warmup-fraction" in training_flags(suite, run)
    assert "lr-warmup-iters" not in training_flags(suite, run)
