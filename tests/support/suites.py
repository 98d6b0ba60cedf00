"""A suite small enough to train in tests, its texts, wheels, and results of runs that were never trained."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from maskmoe.comparison.table import HeldOutLoss, RunResult

SUITE = """
data: {vocab-size: 300, held-out: {other: other.jsonl}}
flags:
  hybrid-layer-pattern: '*-*-'
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
  lr: 1e-2
  eval-interval: 10
  eval-iters: 2
  log-interval: 5
  num-workers: 0
expert-flags:
  hybrid-layer-pattern: '*E*E'
  num-experts: 4
  moe-ffn-hidden-size: 64
  moe-router-topk: 1
  moe-router-pre-softmax: true
baselines: [smoe]
variants:
  dense: {mask: none}
  smoe: {mask: {preset: smoe}}
  all-visible: {mask: {frequent-mass: 1.0, frequent-visible-experts: 4, assignment: uniform}}
"""


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Write two text files with few different words, for which a small vocabulary suffices."""
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "and", "(", ")", "1", "2"]
    paths = folder / "text.jsonl", folder / "other.jsonl"
    for path, documents in zip(paths, (range(400), range(1000, 1050)), strict=True):
        with path.open("w") as stream:
            for document in documents:
                chosen = [words[(document * 7 + i * i) % len(words)] for i in range(60)]
                stream.write(json.dumps({"text": " ".join(chosen)}) + "\n")
    return paths


def result(variant: str, seed: int, loss: float, settings: dict[str, str] | None = None) -> RunResult:
    """Return the result of a run of the suite `small`, with one band that has half of the tokens.

    Args:
        variant: Name of the variant.
        seed: Seed of the run.
        loss: Loss on all tokens; that of the band is 1 lower.
        settings: Settings of the run; by default only the variant's name.
    """
    losses = [("all", 1000, loss), ("top 40 %", 500, loss - 1)]
    return RunResult(
        suite="small",
        variant=variant,
        seed=seed,
        settings=settings or {"variant": variant},
        text={"training": "digest"},
        mask="mask",
        losses=[HeldOutLoss(text="held-out", band=band, tokens=tokens, loss=of) for band, tokens, of in losses],
        seconds=60.0,
        origin={"commit": "0123456789abcdef"},
    )


def make_wheel(path: Path, files: Mapping[str, bytes | str]) -> None:
    """Write a wheel with files in the given order."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
