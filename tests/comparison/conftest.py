"""Suites small enough to read."""

import pytest
from support.wheels import make_wheel, source, write_description

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


@pytest.fixture
def text_of_packages(tmp_path):
    """The description of the text of a wheel in `packages`, in two domains for training and one that is held out."""
    words = ["alpha", "beta", "gamma", "delta", "of", "the", "and", "(", ")", "1", "2"]

    def text(number):
        return " ".join(words[(number * 7 + i * i) % len(words)] + str(number) * (i % 30 == 0) for i in range(120))

    folder = tmp_path / "packages"
    folder.mkdir()
    wheel = folder / "words-1.0-py3-none-any.whl"
    kinds = ("prose", "code", "other")
    files = {f"{kind}/{n}.py": text(1000 * place + n) for place, kind in enumerate(kinds) for n in range(40)}
    sha256 = make_wheel(wheel, files)
    sources = {kind: [source(wheel, sha256, members=f"{kind}/*")] for kind in kinds}
    held_out = {"other": sources.pop("other")}
    return write_description(tmp_path / "small-text.yaml", sources, held_out, held_out_bytes=2000)
