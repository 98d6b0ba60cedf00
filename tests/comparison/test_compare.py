"""launch/compare.sh as a real process: a small suite from text to report, killed on the way."""

import json
import re
import signal
import subprocess
import sys

import psutil
import pytest
from support.paths import ROOT
from support.waiting import wait_until

from maskmoe.comparison.parts import Part
from maskmoe.data.indexed_dataset import read_index
from maskmoe.workflow.lock import locked
from maskmoe.workflow.record import RunRecord

TEXT_DOCUMENTS = 400


@pytest.fixture
def text(tmp_path):
    """A text file with few different words, for which a small vocabulary suffices."""
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "and", "(", ")", "1", "2"]
    path = tmp_path / "text.jsonl"
    with path.open("w") as stream:
        for document in range(TEXT_DOCUMENTS):
            chosen = [words[(document * 7 + i * i) % len(words)] for i in range(60)]
            stream.write(json.dumps({"text": " ".join(chosen)}) + "\n")
    return path


def compare(*arguments):
    command = [sys.executable, "-P", "-m", "maskmoe", "compare", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def without_origin(report):
    """Return a report without the lines that state durations, machines, commits and the command."""
    before, _, after = report.partition("## What is compared")
    return before + after.partition("\n```\n\n")[2]


def is_finished(run, stage):
    path = run / "stages.json"
    return path.exists() and stage in (record := RunRecord(path)) and record[stage].is_finished


def test_bad_suite_is_one_line(tmp_path):
    process = compare(tmp_path / "nowhere.yaml")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert output == f"error: the suite {tmp_path / 'nowhere.yaml'} does not exist\n"


def test_data_of_runs_that_another_command_trains_are_not_replaced(suite_file, text, tmp_path):
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run" / ".lock"):
        process = compare(suite_file(), "--input", text, "--run-dir", tmp_path / "run")
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r"error: another command .* is at work in .*\n", output)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_list_names_all_known_runs(suite_file, text, tmp_path):
    process = compare(suite_file(), "--input", text, "--run-dir", tmp_path / "run", "--list")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "to do     checks/dense\n" in output
    assert "to do     tuning/smoe.lr-1e-3\n" in output
    assert not (tmp_path / "run").exists()


SUITE = """
data: {vocab-size: 300}
flags:
  num-layers: 2
  hidden-size: 32
  ffn-hidden-size: 64
  num-attention-heads: 2
  position-embedding-type: rope
  normalization: RMSNorm
  swiglu: true
  disable-bias-linear: true
  seq-length: 16
  max-position-embeddings: 16
  micro-batch-size: 2
  global-batch-size: 2
  train-iters: 40
  eval-interval: 10
  eval-iters: 2
  log-interval: 5
  num-workers: 0
expert-flags: {num-experts: 4, moe-ffn-hidden-size: 64, moe-router-topk: 1, moe-router-pre-softmax: true}
seeds: [1]
baselines: [smoe]
learning-rates: {values: [1e-2], iterations: 10}
probe-tokens: 64
keep-checkpoints: last
variants:
  dense: {}
  smoe: {mask: {preset: smoe}}
  maskmoe: {mask: {frequent-mass: 0.4, frequent-visible-experts: 2, assignment: balanced}}
  all-visible:
    mask: {frequent-mass: 1.0, frequent-visible-experts: 4, assignment: uniform}
    equals: smoe
    until: 5
"""


@pytest.mark.slow
def test_killed_suite_continues_to_the_report(text, tmp_path):
    path = tmp_path / "suite.yaml"
    path.write_text(SUITE)
    folder = tmp_path / "run"
    arguments = (path, "--input", text, "--run-dir", folder, "--jobs", 2)

    first = compare(*arguments)
    run = folder / "runs" / "dense.seed-1"
    wait_until(lambda: is_finished(run, "evaluate"), "the first evaluation", timeout=240)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    written = (run / "evaluation.json").stat().st_mtime_ns

    second = compare(*arguments)
    output, _ = second.communicate(timeout=400)
    assert second.returncode == 0, output
    assert (run / "evaluation.json").stat().st_mtime_ns == written
    parts = {part.variant: part for part in map(Part.read, (folder / "parts" / "runs").iterdir())}
    assert set(parts) == {"dense", "smoe", "maskmoe", "all-visible"}
    assert all(len(parts[name].validation.iterations) == 4 for name in ("dense", "smoe", "maskmoe"))
    assert all(part.tokens_per_second > 0 and part.origin.packages["torch"] for part in parts.values())
    assert len(parts["smoe"].exact_losses.iterations) == 5
    report = (folder / "report" / "README.md").read_text()
    assert "5 iterations, the same to the last bit" in report
    assert "**Unfinished**" not in report
    routing = parts["smoe"].evaluation.routing
    assert routing.iterations == list(range(5, 41, 5))
    for name in ("dense", "smoe"):
        assert [path.name for path in folder.glob(f"runs/{name}.seed-1/checkpoints/iter_*")] == ["iter_0000040"]

    third = compare(*arguments)
    output, _ = third.communicate(timeout=60)
    assert third.returncode == 0
    assert "runs:" not in output

    # Checkpoints that were removed cannot be analyzed again. The results are kept.
    part = folder / "parts" / "runs" / "smoe.seed-1.json"
    changed = tmp_path / "changed" / "suite.yaml"
    changed.parent.mkdir()
    changed.write_text(SUITE.replace("probe-tokens: 64", "probe-tokens: 128"))
    output, _ = compare(changed, *arguments[1:], "--only", "smoe").communicate(timeout=60)
    assert "the analysis of the routing cannot be repeated (its settings changed (--tokens: 64 → 128))" in output
    assert part.exists()

    # The results move with their folder.
    folder = folder.rename(tmp_path / "moved")
    output, _ = compare(path, "--input", text, "--run-dir", folder, "--list").communicate(timeout=60)
    assert {line.split()[0] for line in output.splitlines() if "runs/" in line} == {"finished"}

    # Another machine has half of the parts, and trains the other half.
    for name in ("dense", "all-visible"):
        (folder / "parts" / "runs" / f"{name}.seed-1.json").rename(tmp_path / f"{name}.json")
    other = (path, "--input", text, "--run-dir", tmp_path / "other", "--merge", folder / "parts", "--jobs", 2)
    output, _ = compare(*other).communicate(timeout=400)
    assert "2 runs: runs/dense.seed-1, runs/all-visible.seed-1" in output
    halves = ("--merge", folder / "parts", tmp_path / "other" / "parts", "--output", tmp_path / "report")
    output, _ = compare(path, "--run-dir", tmp_path / "empty", *halves, "--report").communicate(timeout=60)
    assert without_origin((tmp_path / "report" / "README.md").read_text()) == without_origin(report)

    # A repeated run has the recorded loss.
    output, _ = compare(*other, "--rerun", "--only", "dense").communicate(timeout=400)
    assert re.search(r"^dense.seed-1 +([0-9.]+) +\1 +[+]0.0000 ", output, re.MULTILINE), output


@pytest.mark.slow
def test_runs_are_evaluated_on_each_held_out_set(text_of_packages, tmp_path):
    path = tmp_path / "suite.yaml"
    variants = "{smoe: {mask: {preset: smoe}}}"
    data = f"data: {{sources: {text_of_packages.name}, vocab-size: 300}}"
    before, _, _ = SUITE.partition("variants:")
    path.write_text(before.replace("data: {vocab-size: 300}", data) + f"variants: {variants}\n")
    process = compare(path, "--packages", tmp_path / "packages", "--run-dir", tmp_path / "run")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    run = tmp_path / "run" / "runs" / "smoe.seed-1"
    names = ("", "-prose", "-code", "-other")
    results = [json.loads((run / f"evaluation{name}.json").read_text()) for name in names]
    assert len({result["loss"] for result in results}) == len(names)
    for result in results:
        assert [band["name"] for band in result["bands"]] == [band["name"] for band in results[0]["bands"]]
    # Each set is evaluated as a whole: only the tokens after the last full sample are left out.
    for name, result in zip(names[1:], results[1:], strict=True):
        num_tokens = int(read_index(tmp_path / "run" / "data" / f"held-out{name}_text_document").sequence_lengths.sum())
        assert num_tokens - 2 * 16 <= result["tokens"] <= num_tokens
