"""Parts of finished runs: merged, refused, and reported in a folder that holds nothing else."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.comparisons import without_command
from support.synthetic import BEST_RATE, EFFECTS, TEXT, runs_of, synthetic_part, write_parts

from maskmoe.command_line import compare as command
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.execution import report
from maskmoe.comparison.parts import FoundPart, Part, check_settings, count_equal, first_difference, identity_of
from maskmoe.comparison.report import render_report
from maskmoe.comparison.rerun import rerun_table
from maskmoe.comparison.results import collect_results
from maskmoe.comparison.run_results import Band, Curve, Evaluation, HeldOut
from maskmoe.comparison.runs import tuning_runs, whole_runs
from maskmoe.comparison.selection import Selection
from maskmoe.comparison.suite import Suite
from maskmoe.errors import UserError

NUM_PARTS = 4 * 2 + 4 * 2 + 1 + 1 + 3  # tuning runs, main variants, uniform masks, the limit, the grid


@pytest.fixture
def suite(suite_file):
    return Suite.read(suite_file(), {})


@pytest.fixture
def folder(suite, tmp_path):
    """A folder with the parts of all runs."""
    write_parts(suite, tmp_path / "parts")
    return tmp_path / "parts"


@pytest.fixture
def compare(suite_file, tmp_path, monkeypatch, capsys):
    """Run `maskmoe compare SUITE` in this process, in an empty run folder; return what the command prints."""

    def compare(*words):
        arguments = ["maskmoe compare", suite_file(), "--run-dir", tmp_path / "run", *words]
        monkeypatch.setattr(sys, "argv", [str(word) for word in arguments])
        command.main()
        return capsys.readouterr().out

    return compare


def refused(compare, *words):
    """Run the command, and return the one line with which it refuses its input."""
    with pytest.raises(UserError) as error:
        compare(*words)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path, **changes):
    """Replace attributes of a part's file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- Files -----------------------------------------------------------------------------------------------------------


def test_part_is_read_as_it_was_written(suite, folder):
    parts = [synthetic_part(suite, run) for run in runs_of(suite)]
    assert len(parts) == len(list(folder.rglob("*.json"))) == NUM_PARTS
    for part in parts:
        assert Part.read(folder / f"{part.run}.json") == part


def test_numbers_have_7_digits_and_exact_losses_those_of_fp32(suite, tmp_path):
    run = runs_of(suite)[0]
    part = synthetic_part(suite, run, seconds=1.23456789, exact_losses=Curve(iterations=[1], losses=[1.23456789012]))
    part.write(tmp_path / "part.json")
    content = json.loads((tmp_path / "part.json").read_text())
    assert content["seconds"] == 1.234568
    assert content["exact_losses"]["losses"] == [1.23456789]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_exact_losses_keep_every_bit_of_fp32(loss):
    kept = float(f"{loss:.9g}")
    assert np.float32(kept).tobytes() == np.float32(loss).tobytes()


def test_loss_that_is_not_a_number_is_kept(suite, tmp_path):
    run = next(run for run in runs_of(suite) if run.is_analyzed)
    part = synthetic_part(suite, run)
    evaluation = part.evaluation.model_copy(update={"loss": math.nan})
    part.model_copy(update={"evaluation": evaluation}).write(tmp_path / "part.json")
    assert math.isnan(Part.read(tmp_path / "part.json").result.loss)


def test_thinned_curve_has_at_most_200_points_and_the_same_mean():
    losses = [math.sin(i) for i in range(997)]
    curve = Curve(iterations=list(range(20, 20 * 998, 20)), losses=losses)
    thin = curve.thinned()
    assert len(thin.losses) == 200
    assert thin.iterations[:2] == [100, 200]
    assert thin.iterations[-1] == curve.iterations[-1]
    assert thin.losses[0] == pytest.approx(math.fsum(losses[:5]) / 5)
    assert thin.losses[-1] == pytest.approx(math.fsum(losses[995:]) / 2)
    short = Curve(iterations=[1, 2], losses=[3.0, 4.0])
    assert short.thinned() == short
    assert Curve().thinned() == Curve()


def test_large_part_stays_below_15_kib(suite, tmp_path):
    """A run of 5 checkpoints more than usual, with 200 points of training and 80 held-out losses."""
    run = next(run for run in runs_of(suite) if run.variant.has_experts and run.is_analyzed)
    curves = {
        "training": Curve(iterations=list(range(100, 20_100, 100)), losses=[2 + 1 / (i + 3) for i in range(200)]),
        "validation": Curve(iterations=list(range(200, 16_200, 200)), losses=[2 + 1 / (i + 7) for i in range(80)]),
        "exact_losses": Curve(iterations=list(range(1, 101)), losses=[2 + 1 / (i + 9) for i in range(100)]),
    }
    part = synthetic_part(suite, run, **curves)
    evaluation, rows = part.evaluation, [[1.234567] * 3] * 15
    routing = evaluation.routing.model_copy(
        update={"entropy": rows, "first_weight": rows, "fluctuation": rows, "routable_fluctuation": rows}
    )
    part = part.model_copy(update={"evaluation": evaluation.model_copy(update={"routing": routing})})
    part.write(tmp_path / "part.json")
    assert 5_000 < (tmp_path / "part.json").stat().st_size < 15 * 1024


def test_further_held_out_texts_are_read_from_their_files(tmp_path):
    band = {"name": "top 40 %", "share": 1.0, "loss": 2.0}
    content = {"loss": 2.0, "bands": [band], "expert_load": [{"tokens_per_expert": [1, 2]}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (tmp_path / "evaluation-other domain.json").write_text(json.dumps(content | {"loss": 3.0}))
    (tmp_path / "evaluation-stories.json").write_text(json.dumps(content | {"loss": 4.0}))
    (tmp_path / "evaluation-earlier.json").write_text(json.dumps(content | {"loss": 5.0}))
    further = {name: tmp_path / f"evaluation-{name}.json" for name in ("stories", "other domain")}
    evaluation = Evaluation.read(tmp_path / "evaluation.json", further, None)
    assert evaluation.load == [[1, 2]]
    assert {name: each.loss for name, each in evaluation.further.items()} == {"other domain": 3.0, "stories": 4.0}
    assert evaluation.held_out("stories") == HeldOut(loss=4.0, bands=[Band(**band)])
    assert evaluation.held_out("nothing") is None


def test_band_without_tokens_is_read(tmp_path):
    content = {"loss": 2.0, "bands": [{"name": "top 40 %", "share": 0.0, "loss": None}], "expert_load": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    (band,) = Evaluation.read(tmp_path / "evaluation.json", {}, None).bands
    assert math.isnan(band.loss)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole_suite(tmp_path_factory, suite_text):
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(suite_text)
    return Suite.read(path, {})


@settings(max_examples=100)
@given(data=st.data())
def test_damaged_part_is_refused_in_one_line_or_reported(data, whole_suite, tmp_path_factory):
    """A value anywhere in a part is replaced by another, or is missing."""
    run = next(run for run in runs_of(whole_suite) if run.is_analyzed and run.variant.has_experts)
    content = json.loads(synthetic_part(whole_suite, run).text_of_file)
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if data.draw(st.booleans()):
        place[key] = data.draw(JSON)
    else:
        del place[key]
    path = tmp_path_factory.mktemp("damaged") / "part.json"
    path.write_text(json.dumps(content))
    refusal = ""
    try:
        part = Part.read(path)
        check_settings(FoundPart(path, part), whole_suite, run)
        render_report(collect_results(whole_suite, {run.name: part}, "command"), {})
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@given(content=st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_in_one_line(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "part.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Part.read(path)
    assert "\n" not in str(error.value)


# ---- Merging ---------------------------------------------------------------------------------------------------------


def test_merged_runs_are_not_trained_again(compare, folder):
    shutil.rmtree(folder / "runs")
    listed = compare("--merge", folder, "--list").splitlines()
    assert [line.split()[-1] for line in listed if line.startswith("merged ")] == sorted_names(folder)
    to_do = {line.split()[-1] for line in listed if line.startswith("to do ")}
    assert to_do >= {"checks/dense", "checks/all-visible", "runs/maskmoe-uniform.seed-2"}
    assert len([line for line in listed if not line.startswith("cost ")]) == len(to_do) + 8


def sorted_names(folder):
    """Return the names of the runs in the order in which they are listed: by variant, then by learning rate."""
    variants = ["dense", "smoe", "hash", "maskmoe"]
    names = [f"tuning/{variant}.lr-{rate}" for variant in variants for rate in ("1e-3", "1e-2")]
    assert {name + ".json" for name in names} == {str(path.relative_to(folder)) for path in folder.rglob("*.json")}
    return names


def test_merged_tuning_runs_choose_the_learning_rates(suite, compare, folder):
    shutil.rmtree(folder / "runs")
    for variant, loss in (("dense", 9.0), ("smoe", 1.0)):
        path = folder / "tuning" / f"{variant}.lr-1e-2.json"
        change(path, validation={"iterations": [100], "losses": [loss]})
    path = folder / "tuning" / "hash.lr-1e-3.json"
    path.unlink()
    comparison = command.open_comparison(command.parse_arguments(words_of(suite, folder)))
    rates = comparison.learning_rates()
    assert (rates["dense"], rates["smoe"], rates["maskmoe-uniform"]) == ("1e-3", "1e-2", "1e-2")
    assert "hash" not in rates
    assert {run.variant.name for run in comparison.whole_runs()}.isdisjoint({"hash"})


def open_(words):
    return command.open_comparison(command.parse_arguments(words))


def words_of(suite, folder):
    """Return the arguments that merge the parts of a folder."""
    return [str(folder.parent / f"{suite.name}.yaml"), "--run-dir", str(folder.parent / "run"), "--merge", str(folder)]


def test_report_of_two_halves_is_the_report_of_the_whole(suite, compare, folder, tmp_path):
    compare("--merge", folder, "--report")
    report = (tmp_path / "run" / "report" / "README.md").read_text()
    runs = runs_of(suite)
    write_parts(suite, tmp_path / "half", runs[::2])
    write_parts(suite, tmp_path / "other half", runs[1::2])
    compare("--merge", tmp_path / "half", "--merge", tmp_path / "other half", "--report", "--output", tmp_path / "new")
    assert without_command((tmp_path / "new" / "README.md").read_text()) == without_command(report)
    compare("--merge", tmp_path / "half", "--report", "--output", tmp_path / "new")
    assert "**Unfinished**" in (tmp_path / "new" / "README.md").read_text()
    assert "**Unfinished**" not in report


def test_report_from_parts_alone(compare, folder, tmp_path):
    """No text, no dataset and no checkpoints are needed, and nothing is written but the report."""
    start = time.monotonic()
    compare("--merge", folder, "--report")
    assert time.monotonic() - start < 60
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report"]
    report = (tmp_path / "run" / "report" / "README.md").read_text()
    _, _, to_smoe = report.partition("## Difference to smoe")
    for held_out, factor in (("held-out text of the suite", 1), ("held-out text: stories", 2)):
        table = to_smoe.partition(f"smoe: {held_out}")[2]
        (mean,) = re.findall(r"\| hash +\| +\**([−+][\d.]+)", table.partition("###")[0].partition("##")[0])
        assert float(mean.replace("−", "-")) == pytest.approx(factor * (-0.06 - EFFECTS["smoe"]), abs=1e-4)
    assert "2 iterations, the same to the last bit" in report
    assert "at commit 0123456789ab;" in report


def test_compare_writes_the_report_if_all_runs_are_merged(compare, folder, tmp_path):
    assert "report: " in compare("--merge", folder)
    assert not (tmp_path / "run" / "data").exists()


def test_report_of_150_parts_takes_less_than_a_minute(suite_file, compare, tmp_path):
    suite = Suite.read(suite_file(replace={"seeds: [1, 2]": f"seeds: {list(range(1, 35))}"}), {})
    write_parts(suite, tmp_path / "many")
    assert len(list((tmp_path / "many").rglob("*.json"))) > 145
    start = time.monotonic()
    arguments = command.parse_arguments([*words_of(suite, tmp_path / "many"), "--report"])
    report(command.open_comparison(arguments), [])
    assert time.monotonic() - start < 60


# ---- Parts of other suites -------------------------------------------------------------------------------------------


@pytest.fixture
def others(suite_text, tmp_path):
    """A folder with the parts of another suite, which has other names, and other words for the same numbers."""
    text = suite_text.replace("maskmoe-uniform: ", "masked: ").replace(
        "values: [1e-2, 1e-3]", "values: [0.010, 1.0e-3]"
    )
    path = tmp_path / "other.yaml"
    path.write_text(text)
    other = Suite.read(path, {})
    rates = dict.fromkeys(other.variants, "0.010")
    write_parts(other, tmp_path / "others", (*tuning_runs(other), *whole_runs(other, rates)))
    return tmp_path / "others"


def keep_only(folder, *names):
    for path in folder.rglob("*.json"):
        if str(path.relative_to(folder)) not in names:
            path.unlink()


def states_of(listed):
    """Return the states of runs by name, in order, from the lines of `--list`."""
    lines = [line for line in listed.splitlines() if not line.startswith("cost ")]
    return {line[10:]: line[:10].strip() for line in lines}


def test_runs_of_another_suite_with_equal_settings_are_finished(suite, compare, folder, others, tmp_path):
    """One part of the own suite says which text is meant."""
    compare("--merge", folder, "--report", "--output", tmp_path / "own")
    keep_only(folder, "tuning/smoe.lr-1e-2.json")
    states = states_of(compare("--merge", folder, others, "--list"))
    assert states == {run.name: "merged" for run in runs_of(suite)}
    assert "report: " in compare("--merge", folder, others)
    assert not (tmp_path / "run" / "data").exists()
    merged, own = [without_command((tmp_path / path / "README.md").read_text()) for path in ("run/report", "own")]
    assert merged == own


def test_part_of_another_suite_needs_the_same_settings_and_text(compare, folder, others):
    keep_only(folder, "tuning/smoe.lr-1e-2.json")
    parts = others / "tuning"
    change(parts / "dense.lr-0.010.json", text=TEXT | {"split": "8,2,0"})
    content = json.loads((parts / "hash.lr-0.010.json").read_text())
    change(parts / "hash.lr-0.010.json", settings=content["settings"] | {"weight-decay": "0.1"})
    states = states_of(compare("--merge", folder, others, "--list"))
    assert states["tuning/dense.lr-1e-2"] == states["tuning/hash.lr-1e-2"] == "to do"
    assert states["tuning/dense.lr-1e-3"] == states["tuning/maskmoe.lr-1e-2"] == "merged"


def test_part_of_another_suite_needs_a_known_text(compare, others):
    """Without a text here, nothing says that the texts are equal."""
    assert set(states_of(compare("--merge", others, "--list")).values()) == {"to do"}


def test_part_of_another_suite_needs_the_losses_of_a_limit(compare, folder, others):
    keep_only(folder, *(f"tuning/{path.name}" for path in (folder / "tuning").iterdir()))
    complete = (others / "runs" / "smoe.seed-1.json").read_bytes()
    for number in (1, 2):
        change(others / "runs" / f"smoe.seed-{number}.json", exact_losses=Curve().model_dump())
    states = states_of(compare("--merge", folder, others, "--list"))
    assert states["runs/smoe.seed-1"] == "to do"  # `all-visible` has seed 1
    assert states["runs/smoe.seed-2"] == states["runs/dense.seed-1"] == "merged"
    (others / "runs" / "smoe.seed-1.of-a-third-suite.json").write_bytes(complete)
    assert states_of(compare("--merge", folder, others, "--list"))["runs/smoe.seed-1"] == "merged"
    (others / "runs" / "a.json").write_bytes(complete)
    assert states_of(compare("--merge", folder, others, "--list"))["runs/smoe.seed-1"] == "merged"


EQUAL_POINTS = """
curves:
  length: {title: iterations, of: maskmoe, points: {20: &short {flags: {train-iters: 20}}}}
  again: {title: again, of: [smoe, maskmoe], seeds: [2], points: {1: *short}}
  other-text: {title: ids, of: maskmoe, points: {400: {flags: {train-iters: 20}, vocab-size: 400}}}
"""


def test_equal_runs_of_a_suite_are_trained_once(suite_file, folder, tmp_path):
    """Two points of curves have the same setting. A third point has another text."""
    path = suite_file(replace={"data:": f"{EQUAL_POINTS}\ndata:"})
    suite = Suite.read(path, {})
    comparison = open_(words_of(suite, folder))
    curves = {run.name for run in comparison.whole_runs() if run.variant.role == "curve"}
    assert len(curves) == 6
    unfinished = {run.name for run in comparison.unfinished(comparison.whole_runs())}
    assert curves - unfinished == {"runs/maskmoe.again-1.seed-2"}
    (run,) = [run for run in comparison.whole_runs() if run.name == "runs/maskmoe.length-20.seed-2"]
    synthetic_part(suite, run).write(folder / f"{run.name}.json")
    comparison = open_(words_of(suite, folder))
    unfinished = {run.name for run in comparison.unfinished(comparison.whole_runs())}
    assert curves - unfinished == {"runs/maskmoe.again-1.seed-2", run.name}
    parts = {name: found.part for name, found in comparison.finished_parts().items()}
    assert parts["runs/maskmoe.again-1.seed-2"].result.loss == parts[run.name].result.loss
    results = collect_results(suite, parts, "command")
    assert len(results.runs) == len(results.training_seconds) + 1
    assert "maskmoe.other-text-400" in results.unfinished


def test_repeated_run_may_be_one_of_another_suite(suite, folder, others):
    keep_only(folder, *(f"tuning/{path.name}" for path in (folder / "tuning").iterdir()))
    comparison = open_([*words_of(suite, folder), str(others), "--rerun", "--only", "maskmoe", "--seeds", "2"])
    assert [run.name for run in comparison.whole_runs()] == ["runs/maskmoe.seed-2"]
    assert comparison.recorded["runs/maskmoe.seed-2"].part.learning_rate == "1e-2"


@given(number=st.decimals(allow_nan=False, allow_infinity=False, places=3), digits=st.integers(0, 3))
def test_identity_compares_numbers_by_value(number, digits):
    words = [str(number), f"{number:E}", f"{number}" + "0" * digits]
    identities = {identity_of("whole", True, {"lr": f"a {word}"}, {}) for word in words}
    assert len(identities) == 1
    assert identity_of("whole", True, {"lr": f"a {number + 1}"}, {}) not in identities
    assert identity_of("whole", True, {"name": "1e-2 x"}, {}) != identity_of("whole", True, {"name": "1e-2 y"}, {})


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_part_with_other_settings_is_refused(compare, folder):
    path = folder / "runs" / "smoe.seed-2.json"
    change(path, settings=json.loads(path.read_text())["settings"] | {"hidden-size": "64"})
    message = refused(compare, "--merge", folder, "--report")
    assert message.endswith(
        "smoe.seed-2.json was made with other settings than the suite small has now: hidden-size is 64, not 32"
    )


def test_part_with_another_mask_is_refused(compare, folder):
    path = folder / "runs" / "hash.seed-1.json"
    settings = json.loads(path.read_text())["settings"]
    del settings["mask.shared-table"]
    change(path, settings=settings)
    assert "hash.seed-1.json was made with other" in refused(compare, "--merge", folder)
    assert "mask.shared-table is not given, not true" in refused(compare, "--merge", folder)


def test_part_with_another_learning_rate_than_the_chosen_is_refused(compare, folder):
    path = folder / "tuning" / "dense.lr-1e-3.json"
    change(path, validation={"iterations": [100], "losses": [0.5]})
    assert "dense.seed-1.json was made with" in (message := refused(compare, "--merge", folder, "--report"))
    assert message.endswith("lr is 1e-2, not 1e-3, which the tuning runs choose")


def test_part_of_another_text_is_refused(compare, folder):
    path = folder / "tuning" / "smoe.lr-1e-3.json"
    change(path, text=TEXT | {"dataset.bin": "12" * 32})
    message = refused(compare, "--merge", folder, "--report")
    assert "belongs to another text than" in message
    assert "smoe.lr-1e-3.json" in message or "dataset.bin is abababababab…, not 121212121212…" in message
    assert "dataset.bin" in message


def test_part_of_an_unknown_run_is_refused(compare, folder, suite):
    (folder / "runs" / "smoe.seed-2.json").unlink()
    run = next(run for run in runs_of(suite) if run.name == "runs/smoe.seed-1")
    synthetic_part(suite, dataclasses.replace(run, seed=7)).write(folder / "x.json")
    message = refused(compare, "--merge", folder, "--report")
    assert message.endswith("x.json is a part of the run runs/smoe.seed-7, which the suite small does not have")


def test_part_that_contradicts_its_name_is_refused(compare, folder):
    change(folder / "runs" / "smoe.seed-2.json", seed=1)
    assert "smoe.seed-2.json is damaged: it contradicts" in refused(compare, "--merge", folder, "--report")


def test_part_without_its_evaluation_is_refused(compare, folder):
    change(folder / "runs" / "smoe.seed-2.json", evaluation=None)
    assert "smoe.seed-2.json is damaged: it lacks an evaluation" in refused(compare, "--merge", folder, "--report")


def test_equal_parts_of_one_run_are_merged_and_different_parts_refused(compare, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    compare("--merge", folder, copy, "--list")
    change(copy / "runs" / "dense.seed-1.json", seconds=101.0)
    message = refused(compare, "--merge", folder, copy, "--list")
    assert "parts/runs/dense.seed-1.json and " in message
    assert "copy/runs/dense.seed-1.json are different parts of the run runs/dense.seed-1" in message


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', "\0"])
def test_file_that_is_no_part_is_refused(compare, folder, content):
    (folder / "notes.json").write_text(content)
    assert "notes.json" in refused(compare, "--merge", folder, "--list")


def test_folder_without_parts_is_refused(compare, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no parts" in refused(compare, "--merge", tmp_path / "empty", "--list")
    assert "does not exist" in refused(compare, "--merge", tmp_path / "nowhere", "--list")


def test_refusal_has_exit_code_2(suite_file, folder, tmp_path):
    (folder / "notes.json").write_text("{}")
    words = (suite_file(), "--run-dir", tmp_path / "run", "--merge", folder, "--report")
    result = subprocess.run(
        [sys.executable, "-P", "-m", "maskmoe", "compare", *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert re.fullmatch(r"error: .*notes\.json.*\n", result.stderr)


def test_first_difference_names_what_is_missing():
    assert first_difference({"a": "1"}, {"a": "1"}) == ""
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}) == "b is 2, not not given"
    assert first_difference({"a": "12" * 32}, {"a": "ab" * 32}) == "a is 121212121212…, not abababababab…"


# ---- Selection and repeated runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "seeds", "whole", "tuning"),
    [
        ((), (), 13, 8),
        ((), (1,), 5, 8),
        (("dense",), (), 2, 2),
        (("dense",), (2,), 1, 2),
        (("maskmoe-uniform",), (), 1, 2),
        (("runs/smoe.seed-1",), (), 1, 2),
        (("tuning/*",), (), 0, 8),
        (("maskmoe*", "hash"), (2,), 6, 4),
        (("all-visible",), (), 1, 2),
    ],
)
def test_selection(suite, patterns, seeds, whole, tuning):
    selection = Selection(patterns, seeds)
    selection.check(suite)
    assert (len(selection.whole_runs(suite)), len(selection.tuning_runs(suite))) == (whole, tuning)


@pytest.mark.parametrize("words", [("--only", "nothing*"), ("--seeds", "9"), ("--only", "all-visible", "--seeds", "2")])
def test_selection_of_nothing_is_refused(compare, words):
    message = refused(compare, *words, "--list")
    assert "--only" in message or "--seeds" in message


def test_only_selected_runs_and_their_tuning_runs_are_listed(compare):
    listed = compare("--only", "maskmoe-uniform", "--list").splitlines()
    assert [line.split()[-1] for line in listed if not line.startswith("cost ")] == [
        "checks/maskmoe",
        "checks/maskmoe-uniform",
        "tuning/maskmoe.lr-1e-3",
        "tuning/maskmoe.lr-1e-2",
    ]


FOUR_RATES = {"[1e-2, 1e-3]": "[1e-4, 1e-3, 1e-2, 1e-1]"}


def test_trials_go_towards_the_best_rate(suite_file, tmp_path):
    """`BEST_RATE` is 1e-2, so 1e-4 is not tried, unless the trial itself is selected."""
    path, folder = suite_file(replace=FOUR_RATES), tmp_path / "parts"
    suite = Suite.read(path, {})
    trials = {run.learning_rate: run for run in tuning_runs(suite) if run.variant.name == "maskmoe"}

    def comparison_of(*patterns):
        words = [path, "--run-dir", tmp_path / "run", "--merge", folder, "--only", "maskmoe-uniform", *patterns]
        return command.open_comparison(command.parse_arguments([str(word) for word in words]))

    def finished_and_waiting(*patterns):
        comparison = comparison_of(*patterns)
        runs = comparison.tuning_runs()
        waiting = comparison.unfinished(runs)
        finished = [run for run in runs if run not in waiting]
        return [[run.learning_rate for run in each] for each in (finished, waiting)]

    write_parts(suite, folder, [trials["1e-3"]])
    assert finished_and_waiting() == [["1e-3"], ["1e-4", "1e-2"]]
    write_parts(suite, folder, [trials["1e-2"]])
    assert finished_and_waiting()[1] == ["1e-1"]
    assert finished_and_waiting("tuning/maskmoe.lr-1e-4")[1] == ["1e-4", "1e-1"]
    assert comparison_of().learning_rates() == {}
    write_parts(suite, folder, [trials["1e-1"]])
    comparison = comparison_of()
    assert finished_and_waiting()[1] == []
    assert comparison.learning_rates()["maskmoe-uniform"] == BEST_RATE
    assert [run.learning_rate for run in comparison.whole_runs()] == [BEST_RATE]
    # A run of the phase is found, although the runs beside it have made it needless.
    assert comparison.find_run("tuning/maskmoe.lr-1e-4").learning_rate == "1e-4"


VOCABULARY = "curves: {vocabulary: {title: ids, of: maskmoe, points: {400: {vocab-size: 400}}}}"


def test_every_vocabulary_has_a_dataset_whatever_is_selected(suite_file, tmp_path):
    suite_file(replace={"data:": f"{VOCABULARY}\ndata:"})
    words = [str(tmp_path / "small.yaml"), "--run-dir", str(tmp_path / "run")]
    for selection in ([], ["--only", "dense"]):
        comparison = open_([*words, *selection])
        assert comparison.data_of("maskmoe.vocabulary-400").files.folder.name == "data-400"
        assert comparison.data_of("maskmoe").files.folder.name == "data"
        names = [data.files.folder.name for data in comparison.datasets_of_this_machine()]
        assert sorted(names) == (["data"] if selection else ["data", "data-400"])
    given = ["--data-path", "data", "--split", "9,1,0", "--tokenizer-model", "model"]
    with pytest.raises(UserError, match="runs with a vocabulary of 400 need text"):
        open_([*words, *given])
    assert open_([*words, *given, "--only", "dense"]).vocabularies == {}


def test_parts_of_one_vocabulary_belong_to_one_text(suite_file, tmp_path):
    suite_file(replace={"data:": f"{VOCABULARY}\ndata:"})
    suite = Suite.read(tmp_path / "small.yaml", {})
    folder = tmp_path / "parts"
    write_parts(suite, folder)
    path = folder / "runs" / "maskmoe.vocabulary-400.seed-1.json"
    change(path, text={"split": "1,1,0"})
    words = words_of(suite, folder)
    with pytest.raises(UserError, match=r"belongs to another text than .*: split is"):
        open_(words)
    other = folder / "runs" / "maskmoe.vocabulary-400.seed-2.json"
    change(other, text={"split": "1,1,0"})
    open_(words)


def test_rerun_repeats_merged_runs_with_their_learning_rates(suite, compare, folder):
    listed = compare("--merge", folder, "--rerun", "--only", "dense", "smoe", "--seeds", "2", "--list").splitlines()
    assert [line.split()[-1] for line in listed if line.startswith("to do")] == [
        "checks/dense",
        "checks/smoe",
        "runs/dense.seed-2",
        "runs/smoe.seed-2",
    ]
    assert not [line for line in listed if line.startswith("merged")]
    words = [*words_of(suite, folder), "--rerun", "--only", "dense"]
    shutil.rmtree(folder / "tuning")
    change(folder / "runs" / "dense.seed-1.json", learning_rate="1e-3")
    path = folder / "runs" / "dense.seed-1.json"
    change(path, settings=json.loads(path.read_text())["settings"] | {"lr": "1e-3", "min-lr": "0.0001"})
    rates = {run.seed: run.learning_rate for run in open_(words).whole_runs()}
    assert rates == {1: "1e-3", 2: "1e-2"}


def test_rerun_needs_a_recorded_run(compare, folder):
    message = "no selected run is finished; name the folders of recorded parts by --merge"
    assert message in refused(compare, "--rerun", "--seeds", "1")
    (folder / "runs" / "dense.seed-1.json").unlink()
    assert message in refused(compare, "--merge", folder, "--rerun", "--only", "dense", "--seeds", "1")


def test_rerun_table(suite, folder, monkeypatch):
    """The table against numpy and scipy; a run that was never recorded is not repeated."""
    (folder / "runs" / "hash.seed-2.json").unlink()
    words = [*words_of(suite, folder), "--rerun", "--only", "smoe", "hash", "--seeds", "2"]
    comparison = open_(words)
    repeated = {}
    for run in comparison.whole_runs():
        part = synthetic_part(suite, run)
        part = part.model_copy(update={"evaluation": part.evaluation.model_copy(update={"loss": 2.35})})
        repeated[run.name] = FoundPart(comparison.part_file(run), part)
    find_part = Comparison.find_part
    monkeypatch.setattr(Comparison, "find_part", lambda self, run: repeated.get(run.name) or find_part(self, run))
    _, smoe, summary = rerun_table(comparison).splitlines()
    recorded = [2.32, 2.34]
    low, high = stats.t.interval(0.95, 1, loc=np.mean(recorded), scale=stats.sem(recorded))
    cells = [
        "smoe.seed-2",
        "2.3500",
        "2.3400",
        "+0.0100",
        f"{np.std(recorded, ddof=1):.4f}",
        f"{low:.4f} to {high:.4f}",
    ]
    assert re.split("  +", smoe.strip()) == cells
    assert summary.startswith("1 of 1 repeated losses differ")


# ---- Limits ----------------------------------------------------------------------------------------------------------


def test_limit_is_compared_across_parts(suite, compare, folder, tmp_path):
    change(folder / "runs" / "all-visible.seed-1.json", exact_losses={"iterations": [1, 2, 3], "losses": [5.1, 4.9, 4]})
    compare("--merge", folder, "--report")
    report = (tmp_path / "run" / "report" / "README.md").read_text()
    assert "training losses of 2 iterations, **DIFFERENT** in 2." in report
    change(folder / "runs" / "all-visible.seed-1.json", exact_losses={"iterations": [], "losses": []})
    compare("--merge", folder, "--report")
    assert "no common iterations are recorded." in (tmp_path / "run" / "report" / "README.md").read_text()


def test_count_equal():
    own = Curve(iterations=[1, 2, 4], losses=[1.0, 2.0, 4.0])
    assert count_equal(own, Curve(iterations=[1, 2, 3], losses=[1.0, 2.5, 3.0])) == (2, 1)
    assert count_equal(own, own) == (3, 3)
    assert count_equal(own, Curve()) == (0, 0)
