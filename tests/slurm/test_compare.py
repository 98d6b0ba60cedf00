"""launch/compare.sh --slurm on a real cluster of two nodes."""

import json
import random

import pytest
from support.paths import ROOT

pytestmark = pytest.mark.slurm

SUITE = """
title: Two variants
data: {vocab-size: 300, input: required}
layers: 1
flags:
  hidden-size: 16
  ffn-hidden-size: 32
  num-attention-heads: 2
  position-embedding-type: rope
  normalization: RMSNorm
  swiglu: true
  disable-bias-linear: true
  seq-length: 32
  max-position-embeddings: 32
  micro-batch-size: 2
  global-batch-size: 4
  train-iters: 6
  lr: 1e-2
  lr-decay-style: cosine
  num-workers: 0
  log-interval: 1
  eval-interval: 2
  eval-iters: 1
expert-flags: {num-experts: 4, moe-ffn-hidden-size: 32, moe-router-topk: 1, moe-router-pre-softmax: true}
mask: {frequent-mass: 0.4, frequent-visible-experts: 2, assignment: balanced}
min-lr-ratio: 0.1
variants:
  smoe: {mask: {preset: smoe}}
  maskmoe: {mask: {}}
"""


@pytest.fixture
def compare(cluster, tmp_path):
    """Run launch/compare.sh on the controller, and return its output."""
    (tmp_path / "pair.yaml").write_text(SUITE)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(1, 6))) for _ in range(300)]
    with open(tmp_path / "text.jsonl", "w") as stream:
        for _ in range(100):
            print(json.dumps({"text": " ".join(rng.choices(words, k=100))}), file=stream)
    command = (ROOT / "launch" / "compare.sh", tmp_path / "pair.yaml", "--run-dir", tmp_path / "run")

    def compare(*arguments: str, expect: int = 0) -> str:
        data = ("--input", tmp_path / "text.jsonl")
        return cluster.run(*command, *data, *arguments, expect=expect, timeout=600)

    yield compare
    cluster.run("scancel", "--user=root", expect=None)


def test_one_array_trains_and_evaluates_all_runs(cluster, compare, tmp_path):
    """Both nodes train each run, the first node evaluates it, and a last command writes the page."""
    run = tmp_path / "run"
    cluster.wait_for_nodes()
    said = compare("--slurm", "--", "--nodes=2", "--exclusive")
    assert "Submitted batch job" in said
    assert "to end them: scancel" in compare("--slurm", "--", "--nodes=2", expect=2)
    cluster.wait_for_queue(1500)
    logs = {log.relative_to(run): log.read_text() for log in run.glob("**/*.log")}
    assert "report:" in compare("--report"), logs
    assert "2 of 2 runs" in (run / "report" / "README.md").read_text(), logs
    results = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert sorted(result["variant"] for result in results) == ["maskmoe", "smoe"]
    assert all([step for step, _ in result["validation"]] == [2, 4, 6] for result in results)
    assert all(result["seconds"] > 0 for result in results)
    listed = [line for line in compare("--list").splitlines() if not line.startswith("setup: ")]
    assert all(line.startswith("finished") for line in listed)
    assert len(listed) == 2
