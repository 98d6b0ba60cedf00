"""Suites small enough to read."""

import pytest
from support.suites import write_texts

SUITE = """
title: A small suite
data: {vocab-size: 300}
flags: {hybrid-layer-pattern: '*-*-', hidden-size: 32, ffn-hidden-size: 64, seq-length: 16,
  train-iters: 40, global-batch-size: 2, lr: 1e-2}
expert-flags: {hybrid-layer-pattern: '*E*E', num-experts: 4, moe-ffn-hidden-size: 64}
mask: {frequent-mass: 0.4, frequent-visible-experts: 2, assignment: balanced}
min-lr-ratio: 0.1
seeds: [1, 2]
baselines: [smoe, hash]
variants:
  dense: {title: Dense, mask: none}
  smoe: {mask: {preset: smoe}}
  hash: {mask: {preset: hash, shared-table: true}, flags: {moe-ffn-hidden-size: 32, ffn-hidden-size: false}}
  maskmoe: {mask: {}}
  maskmoe-uniform: {mask: {assignment: uniform}, seeds: [2]}
"""


@pytest.fixture
def suite_file(tmp_path):
    """Write a suite file, with some of its text replaced, and return the path."""

    def write(**replacements):
        text = SUITE
        for old, new in replacements.pop("replace", {}).items():
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def texts(tmp_path):
    """Return the two text files of `support.suites`."""
    return write_texts(tmp_path)
