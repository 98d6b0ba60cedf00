"""`maskmoe compare` as a real process: a small suite from text to page, killed on the way, and merged tables."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.command_lines import run_command
from support.paths import ROOT
from support.suites import SUITE, result
from support.system import wait_until

from maskmoe.command_line.compare import open_comparison, parse_arguments
from maskmoe.comparison.comparison import Comparison
from maskmoe.comparison.data import Dataset
from maskmoe.comparison.run import Run
from maskmoe.comparison.suite import Suite
from maskmoe.comparison.table import read_table, write_table
from maskmoe.errors import RunFailure, UserError
from maskmoe.files.outputs import write_text
from maskmoe.launch.machine import Devices


@pytest.fixture
def comparison(suite_file, tmp_path):
    """A comparison none of whose runs is finished."""
    suite = Suite.read(suite_file(), {})
    data = Dataset(tmp_path / "data", "300", suite.seq_length)
    (tmp_path / "run").mkdir()
    return Comparison(suite, "small", tmp_path / "run", tmp_path / "run" / "results.jsonl", data, Devices(0, 2))


def finished(comparison, title, loss):
    """Return the result that a run would have."""
    (run,) = [run for run in comparison.runs if run.title == title]
    return result(run.name, run.seed, loss, run.settings)


def test_a_run_with_a_line_in_the_table_is_finished(comparison):
    results = [finished(comparison, "smoe.seed-1", 3.0), finished(comparison, "smoe.seed-2", 3.1)]
    changed = results[1].model_copy(update={"settings": {**results[1].settings, "clip-grad": "2"}})
    write_table(comparison.table, [results[0], changed])
    assert list(comparison.results()) == ["smoe.seed-1"]
    # A run writes its result into its own folder; the next command adds it to the table.
    folder = comparison.runs[-3].folder
    folder.mkdir(parents=True)
    write_table(folder / "result.jsonl", results)
    comparison.collect()
    assert list(comparison.results()) == ["smoe.seed-1", "smoe.seed-2"]
    assert len(read_table(comparison.table)) == 3


def test_results_on_other_texts_are_told_apart(comparison, monkeypatch):
    """One table may hold results of one suite on several texts."""
    title = "smoe.seed-1"
    own, other = finished(comparison, title, 3.0), finished(comparison, title, 4.0)
    write_table(comparison.table, [own, other.model_copy(update={"text": {"training": "other digest"}})])
    with pytest.raises(UserError, match=r"has results of smoe\.seed-1 on several texts"):
        comparison.results()
    monkeypatch.setattr(Dataset, "digests", lambda data: {"training": "digest"})
    assert [(name, each.losses) for name, each in comparison.results().items()] == [(title, own.losses)]


def test_an_equal_run_of_another_suite_counts(comparison):
    other = finished(comparison, "smoe.seed-1", 3.0).model_copy(update={"suite": "large", "variant": "switch"})
    write_table(comparison.table, [other])
    assert comparison.results()["smoe.seed-1"].variant == "smoe"


def test_a_result_counts_for_the_file_of_its_program_only(comparison, suite_file, tmp_path):
    (tmp_path / "own.py").write_text("1")
    path = suite_file(replace={"smoe: {mask": "smoe: {program: own.py, mask"})
    before, title = replace(comparison, suite=Suite.read(path, {})), "smoe.seed-1"
    of_program = finished(before, title, 3.0)
    digest = before.suite.variants["smoe"].program_sha256
    write_table(before.table, [of_program.model_copy(update={"program_sha256": digest})])
    assert before.results()[title].losses == of_program.losses
    (tmp_path / "own.py").write_text("2")
    after = replace(comparison, suite=Suite.read(path, {}))
    assert title in {run.title for run in after.unfinished(after.runs)}


def test_equal_runs_are_trained_once(comparison, suite_file):
    """A dense variant has no experts whose width could vary."""
    vary = "vary: {num-experts: [4, 8]}\ndata:"
    suite = Suite.read(suite_file(replace={"data:": vary}), {})
    comparison = replace(comparison, suite=suite)
    dense = comparison.selected(["dense.*.seed-1"])
    (waiting,) = comparison.unfinished(dense)
    assert waiting.title == "dense.num-experts-4.seed-1"
    write_table(comparison.table, [finished(comparison, waiting.title, 3.0)])
    assert comparison.unfinished(dense) == []
    assert {run.title for run in dense} <= comparison.results().keys()


def test_sizes_of_all_variants_are_compared(comparison, monkeypatch):
    """The checks of the settings are replaced by a number of parameters for each variant.

    It does not matter which variants are finished, here or elsewhere, or are left out.
    """
    large, trained = "", []

    async def run_steps(folder, settings, steps, files=None):
        run = next((run for run in comparison.runs if run.folder == folder), None)
        if run and steps:
            folder.mkdir(parents=True, exist_ok=True)
            active = 200 if run.name == large else 100
            write_text(run.check_report, json.dumps({"parameters": {"active": active}}))
        elif run:
            trained.append(run.title)

    monkeypatch.setattr("maskmoe.comparison.comparison.run_steps", run_steps)
    monkeypatch.setattr(Run, "files", lambda run: {})
    monkeypatch.setattr(Run, "mask_steps", lambda run: ())
    write_table(comparison.table, [finished(comparison, f"hash.seed-{seed}", 3.0) for seed in (1, 2)])
    waiting = comparison.selected(["dense"])
    for large in ("dense", "hash", "maskmoe"):
        with pytest.raises(UserError, match=f"has 100 active parameters and {large} has 200"):
            asyncio.run(comparison.finish(waiting, 1, only_prepare=True))
    assert not trained
    large = ""
    asyncio.run(comparison.finish(waiting, 1, only_prepare=True))
    assert trained == ["dense.seed-1", "dense.seed-2"]
    assert read_table(waiting[0].folder / "result.jsonl") == []


def test_a_failed_run_does_not_stop_the_others(comparison, monkeypatch, capsys):
    async def run_steps(folder, settings, steps, files=None):
        if folder.name == "smoe.seed-1":
            raise RunFailure("train: no memory")

    monkeypatch.setattr("maskmoe.comparison.comparison.run_steps", run_steps)
    monkeypatch.setattr(Run, "files", lambda run: {})
    monkeypatch.setattr(Run, "steps", lambda run: ())
    monkeypatch.setattr(Comparison, "_check_variants", lambda *_: run_steps(Path(), {}, ()))
    monkeypatch.setattr(
        "maskmoe.comparison.comparison.RunResult.of", lambda _, run: finished(comparison, run.title, 3.0)
    )
    for run in comparison.runs:
        run.folder.mkdir(parents=True)
    with pytest.raises(RunFailure, match=r"1 of 2 runs failed: smoe\.seed-1: train: no memory"):
        asyncio.run(comparison.finish(comparison.selected(["smoe.seed-1", "hash.seed-1"]), 2))
    comparison.collect()
    assert list(comparison.results()) == ["hash.seed-1"]
    assert "smoe.seed-1 FAILED" in capsys.readouterr().out


def test_runs_are_selected_by_patterns(comparison):
    titles = [run.title for run in comparison.selected(["maskmoe*.seed-2", "smoe"])]
    assert titles == ["smoe.seed-1", "maskmoe-uniform.seed-2", "smoe.seed-2", "maskmoe.seed-2"]
    assert comparison.selected([]) == comparison.runs
    with pytest.raises(UserError, match="no run of the suite has such a name"):
        comparison.selected(["maskmoe-uniform.seed-1"])


def compare(*arguments):
    command = [sys.executable, "-P", "-m", "maskmoe", "compare", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


@pytest.fixture
def arguments(tmp_path, texts):
    """The suite above with its text, and the run folder. The suite names the other text."""
    (tmp_path / "suite.yaml").write_text(SUITE)
    return (tmp_path / "suite.yaml", "--input", texts[0], "--run-dir", tmp_path / "run")


def test_list_names_all_runs_and_makes_nothing(arguments, tmp_path):
    outcome = run_command("compare", *arguments, "--list")
    assert outcome.output.splitlines() == [f"to do     {name}.seed-1" for name in ("dense", "smoe", "all-visible")]
    assert not (tmp_path / "run").exists()


def test_text_files_replace_the_dataset_of_a_suite(suite_file, texts):
    existing = "{vocab-size: 300, flags: {data-path: mine, split: '9,1,0', tokenizer-type: x, tokenizer-model: y}}"
    suite = suite_file(replace={"{vocab-size: 300}": existing})
    words = [str(suite), "--input", str(texts[0])]
    data = open_comparison(parse_arguments(words)).data
    assert (data.text, data.existing) == ((texts[0],), {})


@pytest.mark.slow
def test_a_killed_suite_continues_to_the_page(arguments, tmp_path):
    folder = tmp_path / "run"
    first = compare(*arguments, "--jobs", 2)
    evaluation = folder / "runs" / "dense.seed-1" / "evaluation-held-out.json"

    def has_evaluated() -> bool:
        done = evaluation.with_name("done.json")
        return done.exists() and "evaluate-held-out" in json.loads(done.read_text())["done"]

    wait_until(has_evaluated, "the first evaluation", timeout=240, has_ended=lambda: first.poll() is not None)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive

    evaluated = evaluation.stat().st_mtime_ns
    second = compare(*arguments, "--jobs", 2)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    assert evaluation.stat().st_mtime_ns == evaluated
    results = {result.variant: result for result in read_table(folder / "results.jsonl")}
    assert set(results) == {"dense", "smoe", "all-visible"}
    assert {each.text for each in results["dense"].losses} == {"held-out", "other"}
    # All experts visible is SMoE, to the last bit.
    assert results["all-visible"].losses == results["smoe"].losses
    assert results["all-visible"].mask != results["smoe"].mask
    assert results["smoe"].seconds > 0
    assert results["smoe"].origin["torch"]
    page = (folder / "report" / "README.md").read_text()
    assert "3 of 3 runs" in page
    assert [path.name for path in folder.glob("runs/smoe.seed-1/checkpoints/iter_*")] == ["iter_0000040"]

    # Nothing is trained again, also where only the table is.
    output, _ = compare(*arguments).communicate(timeout=60)
    assert re.fullmatch(r"report: .*README.md\n", output)
    other = (*arguments[:3], "--run-dir", tmp_path / "other", "--report", "--table", folder / "results.jsonl")
    output, _ = compare(*other).communicate(timeout=60)
    assert (tmp_path / "other" / "report" / "README.md").read_text() == page

    # A repeated run has the recorded loss.
    again = (*arguments[:3], "--run-dir", tmp_path / "again", "--only", "dense")
    output, _ = compare(*again).communicate(timeout=400)
    (repeated,) = read_table(tmp_path / "again" / "results.jsonl")
    assert repeated.losses == results["dense"].losses, output
