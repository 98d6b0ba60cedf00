"""Recomputation routes every token exactly as the forward pass does."""

import pytest
from support.training_runs import run_pairs

PIPELINE = "pipeline 2, 8 micro-batches"


@pytest.mark.parametrize(
    "pair",
    run_pairs(
        (PIPELINE, "pipeline 2, 8 micro-batches, full recompute"),
        slow=(
            (PIPELINE, "hybrid, pipeline 2, 8 micro-batches, full recompute"),
            ("reference", "full recompute"),
            ("reference", "selective recompute"),
        ),
    ),
)
def test_recompute_is_bit_equal(runs, pair):
    reference, run = runs
    assert run.iterations == reference.iterations
    assert len(run.iterations) >= 6
    assert run.difference(reference) == 0
