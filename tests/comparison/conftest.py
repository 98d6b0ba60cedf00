"""Suites small enough to read."""

import pytest

SUITE = """
title: A small suite
data: {vocab-size: 300}
flags: {num-layers: 2, hidden-size: 32, seq-length: 16, train-iters: 40, global-batch-size: 2, ffn-hidden-size: 64}
expert-flags: {num-experts: 4, moe-ffn-hidden-size: 64}
mask: {frequent-mass: 0.4, frequent-visible-experts: 2, assignment: balanced}
seeds: [1, 2]
baselines: [smoe, hash]
learning-rates: {values: [1e-2, 1e-3], iterations: 10, min-share: 0.1}
variants:
  dense: {title: Dense}
  smoe: {mask: {preset: smoe}}
  hash: {mask: {preset: hash, shared-table: true}, flags: {moe-ffn-hidden-size: 32, ffn-hidden-size: false}}
  maskmoe: {mask: {}}
  maskmoe-uniform: {mask: {assignment: uniform}, tuned-as: maskmoe, seeds: [2]}
  all-visible: {mask: {frequent-mass: 1.0, frequent-visible-experts: 4}, equals: smoe, until: 5, seeds: [1]}
grid: {of: maskmoe, frequent-mass: [0.2, 0.4], frequent-visible-experts: [2, 4], seeds: [2]}
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


@pytest.fixture(scope="session")
def suite_text():
    """The text of the suite that `suite_file` writes."""
    return SUITE
