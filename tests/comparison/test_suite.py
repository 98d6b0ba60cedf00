"""Suite files: the variants that a file describes, the files that are refused, and the suites in launch/suites/."""

import re
from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError

SHIPPED = sorted(path for path in (ROOT / "launch" / "suites").glob("*.yaml") if not path.stem.endswith("-text"))


def test_variants_have_the_flags_of_suite_experts_and_their_own(suite_file):
    suite = Suite.read(suite_file(), {})
    assert suite.variants["dense"].mask == "none"
    assert "num-experts" not in suite.variants["dense"].flags
    assert suite.variants["smoe"].flags["num-experts"] == ("4",)
    assert suite.variants["hash"].flags["moe-ffn-hidden-size"] == ("32",)
    assert "ffn-hidden-size" not in suite.variants["hash"].flags
    assert suite.variants["hash"].flags["min-lr"] == ("0.001",)
    patterns = {name: variant.flags["hybrid-layer-pattern"] for name, variant in suite.variants.items()}
    assert patterns == dict.fromkeys(suite.variants, ("*E*E",)) | {"dense": ("*-*-",)}
    assert [variant.seeds for variant in suite.variants.values()] == [(1, 2)] * 4 + [(2,)]


def test_preset_takes_only_the_common_flags_that_it_does_not_decide(suite_file):
    suite = Suite.read(suite_file(), {})
    assert suite.variants["smoe"].mask == {"preset": ("smoe",)}
    assert suite.variants["hash"].mask == {"preset": ("hash",), "shared-table": ()}
    assert suite.variants["maskmoe-uniform"].mask == {
        "frequent-mass": ("0.4",),
        "frequent-visible-experts": ("2",),
        "assignment": ("uniform",),
    }


def test_vary_makes_a_variant_of_each_combination(suite_file):
    vary = "vary: {lr: [1e-2, 2e-2], mask.frequent-mass: [0.2, 0.8], num-experts: 8, swiglu: [true, false]}\ndata:"
    suite = Suite.read(suite_file(replace={"data:": vary}), {})
    assert len(suite.variants) == 5 * 8
    assert "swiglu" not in suite.variants["maskmoe.lr-2e-2.frequent-mass-0.8.num-experts-8.swiglu-false"].flags
    variant = suite.variants["maskmoe.lr-2e-2.frequent-mass-0.8.num-experts-8.swiglu-true"]
    assert variant.flags["swiglu"] == ()
    assert (variant.flags["lr"], variant.flags["min-lr"], variant.flags["num-experts"]) == (
        ("2e-2",),
        ("0.002",),
        ("8",),
    )
    assert variant.mask["frequent-mass"] == ("0.8",)
    # A preset decides its mask, and a dense model has no experts.
    assert suite.variants["smoe.lr-1e-2.frequent-mass-0.8.num-experts-8.swiglu-true"].mask == {"preset": ("smoe",)}
    assert "num-experts" not in suite.variants["dense.lr-1e-2.frequent-mass-0.2.num-experts-8.swiglu-true"].flags


def test_a_suite_extends_another_one(suite_file, tmp_path):
    base = Suite.read(suite_file(), {})
    path = tmp_path / "more.yaml"
    path.write_text("extends: small.yaml\nflags: {train-iters: 7}\nvariants: {other: {mask: {}}}\nbaselines: [other]\n")
    suite = Suite.read(path, {})
    assert list(suite.variants) == ["other"]
    assert suite.variants["other"].flags == {**base.variants["maskmoe"].flags, "train-iters": ("7",)}
    assert suite.variants["other"].mask == base.variants["maskmoe"].mask
    path.with_name("third.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(UserError, match="a suite that extends no other"):
        Suite.read(path.with_name("third.yaml"), {})


def test_paths_of_an_extended_suite_are_relative_to_its_own_folder(suite_file, tmp_path):
    data = "data: {vocab-size: 300, input: a.txt, held-out: {b: b.txt}}"
    program = "maskmoe: {program: own.py, model: model.yaml, mask"
    suite_file(replace={"data: {vocab-size: 300}": f"model: model.yaml\n{data}", "maskmoe: {mask": program})
    (tmp_path / "model.yaml").write_text("clip-grad: 1\n")
    (tmp_path / "own.py").touch()
    (tmp_path / "further").mkdir()
    path = tmp_path / "further" / "more.yaml"
    path.write_text("extends: ../small.yaml\nflags: {train-iters: 7}\n")
    suite = Suite.read(path, {})
    assert {variant.model for variant in suite.variants.values()} == {str(tmp_path / "model.yaml")}
    assert Path(suite.variants["maskmoe"].program).resolve() == tmp_path / "own.py"
    assert (suite.data.input, suite.data.held_out) == ((f"{tmp_path}/a.txt",), {"b": f"{tmp_path}/b.txt"})
    # Its own paths start at its own folder.
    (path.parent / "other.yaml").write_text("clip-grad: 2\n")
    path.write_text("extends: ../small.yaml\nmodel: other.yaml\ndata: {vocab-size: 300, input: c.txt}\n")
    suite = Suite.read(path, {})
    clips = {name: variant.flags["clip-grad"] for name, variant in suite.variants.items()}
    assert clips == dict.fromkeys(suite.variants, ("2",)) | {"maskmoe": ("1",)}
    assert suite.data.input == (str(path.parent / "c.txt"),)


def test_flags_of_a_suite_replace_those_in_the_layouts_of_a_model_file(suite_file, tmp_path):
    """As on a command line. Only a variant's own layouts replace its flags."""
    decided = ("hidden-size", "num-experts", "ffn-hidden-size", "swiglu", "min-lr", "hybrid-layer-pattern")
    layout = ", ".join(f"{flag}: 9" for flag in (*decided, "micro-batch-size"))
    (tmp_path / "model.yaml").write_text(f"layouts: {{8: {{{layout}}}, 16: {{{layout}}}}}\n")
    own = "maskmoe: {layouts: {16: {swiglu: false}}, mask"
    replace = {"data:": "model: model.yaml\nvary: {swiglu: [true, false]}\ndata:", "maskmoe: {mask": own}
    suite = Suite.read(suite_file(replace=replace), {})
    for name, variant in suite.variants.items():
        kept = {"micro-batch-size"} if variant.has_experts else {"micro-batch-size", "num-experts"}
        assert variant.layouts[8].keys() == kept, name
        assert variant.model == str(tmp_path / "model.yaml")
    assert suite.variants["maskmoe.swiglu-true"].layouts[16] == {"swiglu": ("false",)}


def test_a_value_may_remove_a_flag_of_an_earlier_section(suite_file):
    removing = {
        "maskmoe: {mask": "maskmoe: {flags: {lr: false}, mask",
        "{mask: {assignment": "{mask: {preset: null, assignment",
    }
    variants = Suite.read(suite_file(replace=removing), {}).variants
    assert ("lr" in variants["dense"].flags, "lr" in variants["maskmoe"].flags) == (True, False)
    assert variants["maskmoe-uniform"].mask["frequent-mass"] == ("0.4",)


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("maskmoe: {mask: {}}", "maskmoe: {mask: hash}", "must contain flags"),
        ("seeds: [1, 2]", "vary: {lr: [1e-3, abc]}", "lr must be a finite number, not 'abc'"),
        ("{vocab-size: 300}", "{vocab-size: 300, held-out: {training: a.txt}}", "the name training is taken"),
        ("baselines: [smoe, hash]", "baselines: [moe]", "moe"),
        ("train-iters: 40, ", "", "train-iters"),
        ("train-iters: 40", "train-iters: 0", "train-iters"),
        ("lr: 1e-2", "seed: 3", "seed"),
        ("title: Dense", "flags: {hybrid-layer-pattern: '*E*E'}", "variant dense"),
        ("smoe: {mask", "smoe: {flags: {hybrid-layer-pattern: '*-*-'}, mask", "variant smoe"),
        ("hybrid-layer-pattern: '*-*-', ", "", "variant dense has no num-layers"),
        ("dense: {title", "../dense: {title", "../dense"),
        ("smoe: {mask: {", "smoe: {mask: {program: nowhere.py, ", "nowhere.py is not a file"),
    ],
)
def test_bad_suite_is_refused(suite_file, old, new, names):
    with pytest.raises(UserError, match=re.escape(names)) as error:
        Suite.read(suite_file(replace={old: new}), {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_variants_are_trained_alike(path):
    """The variants of one setting differ only in the flags of their experts and in their learning rates."""
    own = {"ffn-hidden-size", "num-experts", "hybrid-layer-pattern", "lr", "min-lr"}
    widths = ("moe-ffn-hidden-size", "moe-shared-expert-intermediate-size")
    trained: dict[str, dict] = {}
    suite = Suite.read(path, {})
    (dense,) = next(iter(suite.variants.values())).flags["ffn-hidden-size"]
    for name, variant in suite.variants.items():
        flags = {flag: of for flag, of in variant.flags.items() if flag not in own and not flag.startswith("moe-")}
        assert flags == trained.setdefault(variant.setting, flags), name
        # Routed and shared experts of a token are as wide as the dense layer.
        if variant.has_experts:
            assert sum(int(width) for flag in widths for width in variant.flags.get(flag, ())) == int(dense), name
