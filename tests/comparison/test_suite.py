"""Suite files: the variants and runs that a file describes, and the files that are refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.comparison.runs import (
    Run,
    checkpoint_iterations,
    choose_learning_rates,
    next_rates,
    training_flags,
    tuning_runs,
    whole_runs,
)
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError


@pytest.fixture
def suite(suite_file):
    return Suite.read(suite_file(), {})


def test_variants_have_the_flags_of_suite_experts_and_their_own(suite):
    assert suite.variants["dense"].mask is None
    assert "num-experts" not in suite.variants["dense"].flags
    assert suite.variants["smoe"].flags["num-experts"] == ("4",)
    assert suite.variants["hash"].flags["moe-ffn-hidden-size"] == ("32",)
    assert "ffn-hidden-size" not in suite.variants["hash"].flags


def test_preset_takes_only_the_common_flags_that_it_does_not_decide(suite):
    assert suite.variants["smoe"].mask == {"preset": ("smoe",)}
    assert suite.variants["hash"].mask == {"preset": ("hash",), "shared-table": ()}
    assert suite.variants["maskmoe-uniform"].mask == {
        "frequent-mass": ("0.4",),
        "frequent-visible-experts": ("2",),
        "assignment": ("uniform",),
    }


def test_grid_omits_the_point_that_is_a_variant_already(suite):
    assert [variant.name for variant in suite.of_role("grid")] == [
        "maskmoe.p0.2-v2",
        "maskmoe.p0.2-v4",
        "maskmoe.p0.4-v4",
    ]
    assert all(variant.tuned_as == "maskmoe" and variant.seeds == (2,) for variant in suite.of_role("grid"))
    assert suite.variants["maskmoe.p0.2-v4"].number("frequent-visible-experts") == 4


CURVES = """
curves:
  experts:
    title: number of experts
    main-value: 4
    of: [dense, smoe, maskmoe]
    points:
      8: {flags: {num-experts: 8}, mask: {frequent-visible-experts: 3}}
      16: {flags: {num-experts: 16}, seeds: [2], learning-rate-factor: 4}
  vocabulary:
    title: vocabulary
    main-value: 300
    of: maskmoe
    seeds: [1]
    points: {400: {vocab-size: 400}}
"""


def test_a_curve_has_variants_in_further_settings(suite_file):
    suite = Suite.read(suite_file(replace={"data:": f"{CURVES}\ndata:"}), {})
    variants = {variant.name: variant for variant in suite.of_role("curve")}
    assert list(variants) == [
        *(f"{name}.experts-{value}" for value in (8, 16) for name in ("dense", "smoe", "maskmoe")),
        "maskmoe.vocabulary-400",
    ]
    more = variants["maskmoe.experts-8"]
    assert (more.role, more.tuned_as) == ("curve", "maskmoe")
    assert more.flags["num-experts"] == ("8",)
    assert more.mask == {**suite.variants["maskmoe"].mask, "frequent-visible-experts": ("3",)}
    assert variants["smoe.experts-8"].mask == suite.variants["smoe"].mask
    assert "num-experts" not in variants["dense.experts-8"].flags
    assert (more.seeds, variants["smoe.experts-16"].seeds) == ((1, 2), (2,))
    rates = choose_learning_rates(suite, {"tuning/smoe.lr-1e-3": 1.0, "tuning/maskmoe.lr-1e-2": 1.0})
    assert (rates["smoe.experts-8"], rates["maskmoe.experts-8"]) == ("1e-3", "1e-2")
    assert (rates["smoe.experts-16"], rates["maskmoe.experts-16"]) == ("0.004", "0.04")
    assert variants["maskmoe.vocabulary-400"].vocab_size == "400"
    assert [run.variant.role for run in whole_runs(suite, choose_learning_rates(suite, {}))][-10:] == ["curve"] * 10


def test_a_suite_extends_another_one(suite_file, tmp_path):
    suite_file()
    path = tmp_path / "more.yaml"
    path.write_text("extends: small.yaml\nflags: {train-iters: 7}\nvariants: {other: {mask: {}}}\n")
    suite, base = Suite.read(path, {}), Suite.read(suite_file(), {})
    assert (suite.name, suite.title, list(suite.variants)) == ("more", "more", ["other"])
    assert suite.variants["other"].flags == {**base.variants["maskmoe"].flags, "train-iters": ("7",)}
    assert suite.variants["other"].mask == base.variants["maskmoe"].mask
    assert (suite.seeds, suite.data, suite.learning_rates) == (base.seeds, base.data, base.learning_rates)
    path.with_name("third.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(UserError, match="a suite that extends no other"):
        Suite.read(path.with_name("third.yaml"), {})
    path.write_text("extends: ../small.yaml\n")
    with pytest.raises(UserError, match="in the same folder, not"):
        Suite.read(path, {})
    path.write_text("extends: nowhere.yaml\n")
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        Suite.read(path, {})


def test_the_method_in_question_is_the_last_variant_with_a_choice_of_its_own(suite_file):
    assert Suite.read(suite_file(), {}).method == "maskmoe-uniform"
    assert Suite.read(suite_file(replace={"data:": "method: maskmoe\ndata:"}), {}).method == "maskmoe"
    with pytest.raises(UserError, match="method: nothing is not a variant"):
        Suite.read(suite_file(replace={"data:": "method: nothing\ndata:"}), {})


def test_every_tuned_variant_is_tuned_alike(suite):
    runs = tuning_runs(suite)
    assert {(run.variant.name, run.learning_rate, run.seed) for run in runs} == {
        (name, rate, 1) for name in ("dense", "smoe", "hash", "maskmoe") for rate in ("1e-3", "1e-2")
    }
    assert all(training_flags(suite, run)["train-iters"] == ("10",) for run in runs)


@given(st.integers(1, 8), st.data())
def test_search_finds_the_best_rate_between_worse_ones(num_rates, data):
    rates = [f"{rate}e-3" for rate in range(1, num_rates + 1)]
    best = data.draw(st.integers(0, num_rates - 1))
    diverging = data.draw(st.integers(best + 1, num_rates))
    loss = {rate: None if number >= diverging else 2 + abs(number - best) for number, rate in enumerate(rates)}
    tried = {}
    while chosen := next_rates(rates, tried):
        assert tried.keys().isdisjoint(chosen)
        tried |= {rate: loss[rate] for rate in chosen}
    if num_rates == 1:
        assert not tried
        return
    assert min(tried, key=lambda rate: math.inf if tried[rate] is None else tried[rate]) == rates[best]
    assert {rates[number] for number in (best - 1, best + 1) if 0 <= number < num_rates} <= tried.keys()
    # From the middle to the rate behind the best one, in one direction.
    assert len(tried) <= abs(best - (num_rates - 1) / 2) + 3


def test_one_learning_rate_needs_no_tuning(suite_file):
    suite = Suite.read(suite_file(replace={"[1e-2, 1e-3]": "[1e-3]"}), {})
    assert tuning_runs(suite) == ()
    assert set(choose_learning_rates(suite, {}).values()) == {"1e-3"}


def test_learning_rate_of_the_smallest_loss_is_chosen_for_all_variants_that_use_it(suite):
    losses = {run.name: 3.0 for run in tuning_runs(suite)}
    losses["tuning/maskmoe.lr-1e-2"] = 2.0
    losses["tuning/smoe.lr-1e-3"] = None
    rates = choose_learning_rates(suite, losses)
    assert rates["maskmoe"] == rates["maskmoe-uniform"] == rates["maskmoe.p0.2-v2"] == "1e-2"
    assert rates["smoe"] == rates["all-visible"] == "1e-2"
    assert rates["dense"] == "1e-3"


def test_runs_go_seed_by_seed_and_variants_with_most_seeds_come_first(suite):
    runs = whole_runs(suite, choose_learning_rates(suite, {}))
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert names[:5] == [f"runs/{name}.seed-1" for name in ("dense", "smoe", "hash", "maskmoe", "all-visible")]
    assert names[5:10] == [f"runs/{name}.seed-2" for name in ("dense", "smoe", "hash", "maskmoe", "maskmoe-uniform")]
    assert all(name.startswith("runs/maskmoe.p") for name in names[10:])


def test_runs_of_a_variant_differ_in_their_own_flags(suite):
    run = Run(suite.variants["maskmoe"], 2, "1e-2", "whole")
    flags = training_flags(suite, run)
    own = {"lr": ("1e-2",), "min-lr": ("0.001",), "seed": ("2",), "save-interval": ("5",)}
    assert flags == suite.variants["maskmoe"].flags | own
    assert training_flags(suite, Run(suite.variants["all-visible"], 1, "1e-2", "whole"))["exit-interval"] == ("5",)
    tuning = training_flags(suite, Run(suite.variants["maskmoe"], 1, "1e-2", "tuning"))
    assert (tuning["train-iters"], tuning["keep-last-checkpoints"]) == (("10",), ("1",))


@pytest.mark.parametrize(
    ("train_iters", "checkpoints", "name", "kind", "saved"),
    [
        (40, 8, "maskmoe", "whole", list(range(5, 41, 5))),
        (43, 8, "maskmoe", "whole", [*range(5, 41, 5), 43]),
        (40, 100, "maskmoe", "whole", list(range(1, 41))),
        (40, 8, "maskmoe", "tuning", list(range(1, 11))),
        (40, 8, "all-visible", "whole", [5]),
        (40, 13, "all-visible", "whole", [3, 5]),
        (4, 2, "all-visible", "whole", [2, 4]),
    ],
)
def test_a_run_saves_its_checkpoints_evenly_and_the_last_at_its_end(
    suite_file, train_iters, checkpoints, name, kind, saved
):
    changes = {"data:": f"checkpoints: {checkpoints}\ndata:", "train-iters: 40": f"train-iters: {train_iters}"}
    suite = Suite.read(suite_file(replace=changes), {})
    assert checkpoint_iterations(suite, Run(suite.variants[name], 1, "1e-2", kind)) == saved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("variants:", "variant:", "unknown variant; the known keys are .*variants"),
        ("title: A small suite", "name: A small suite", "unknown name; the known keys are baselines"),
        ("maskmoe: {mask: {}}", "maskmoe: {masks: {}}", "variants.maskmoe: unknown masks"),
        ("learning-rates: {values: [1e-2, 1e-3], ", "learning-rates: {", "learning-rates.values: is missing"),
        ("frequent-mass: [0.2, 0.4]", "frequent-mass: []", "grid.frequent-mass: .* at least 1 item"),
        ("tuned-as: maskmoe", "tuned-as: maskmoo", "refers to maskmoo"),
        ("tuned-as: maskmoe", "tuned-as: all-visible", "refers to all-visible"),
        ("equals: smoe", "equals: maskmoe-uniform", "not tuned itself"),
        ("until: 5, seeds: [1]", "until: 5, seeds: [3]", "has seeds that smoe does not have"),
        ("until: 5", "until: soon", "variants.all-visible.until: should be a valid integer, .*, not soon"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "seeds must be different"),
        ("values: [1e-2, 1e-3]", "values: [fast]", "learning-rates.values.0: 'fast' is not a number"),
        ("of: maskmoe", "of: dense", "must name a variant that has a mask"),
        ("data:", "curves: {a: {title: a, main-value: 1, of: b, points: {2: {}}}}\ndata:", "curves.a: .*of: b"),
        (
            "data:",
            "curves: {a: {title: a, main-value: 1, of: smoe, points: {}}}\ndata:",
            "curves.a.points: .*at least 1",
        ),
        ("data:", "curves: {a: {title: a, main-value: 1, of: smoe, points: {x: {}}}}\ndata:", "'x' is not a number"),
        (
            "data:",
            "curves: {a: {title: a, of: smoe, points: {1: {learning-rate-factor: 0}}}}\ndata:",
            "learning-rate-factor: should be greater than 0",
        ),
        ("baselines: [smoe, hash]", "baselines: [moe]", "moe is not a variant of the suite"),
        ("train-iters: 40, ", "", "has no train-iters"),
        ("num-layers: 2,", "num-layers: 2, seed: 3,", "seed is decided by the comparison"),
        ("dense: {title", "../dense: {title", "names a folder"),
        ("data: {vocab-size: 300}", "data: {vocabulary: 300}", "unknown vocabulary"),
        ("iterations: 10", "iterations: 0", "learning-rates.iterations: should be greater than 0, not 0"),
        ("data:", "keep-checkpoints: none\ndata:", "keep-checkpoints: should be 'all' or 'last', not none"),
        ("smoe: {mask", "dense: {mask", "the key dense is repeated"),
        ("smoe: {mask: {preset: smoe}}", "smoe: {model: nowhere.yaml}", "nowhere.yaml"),
        (
            "smoe: {mask",
            "smoe: {layouts: {eight: {}}, mask",
            "variants.smoe.layouts: .* maps numbers of ranks to flags",
        ),
    ],
)
def test_bad_suite_is_refused(suite_file, old, new, message):
    with pytest.raises(UserError, match=message) as error:
        Suite.read(suite_file(replace={old: new}), {})
    assert "\n" not in str(error.value)


def test_a_suite_on_top_of_a_model_file_keeps_its_layouts(suite_file, tmp_path):
    (tmp_path / "model.yaml").write_text("num-layers: 9\nhidden-size: 8\nlayouts: {8: {bf16: true}}\n")
    suite = Suite.read(suite_file(replace={"data:": "model: model.yaml\ndata:", "num-layers: 2, ": ""}), {})
    assert suite.variants["smoe"].flags["num-layers"] == ("9",)
    assert suite.variants["smoe"].flags["hidden-size"] == ("32",)
    assert suite.variants["smoe"].layouts[8] == {"bf16": ()}
