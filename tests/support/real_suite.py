"""A suite small enough to train in tests, and its texts."""

import json
from pathlib import Path

SUITE = """
data: {vocab-size: 300, held-out: {other: other.jsonl}}
layers: 2
flags:
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
expert-flags: {num-experts: 4, moe-ffn-hidden-size: 64, moe-router-topk: 1, moe-router-pre-softmax: true}
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
