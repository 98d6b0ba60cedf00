"""Recomputation routes every token exactly as the forward pass does."""

import pytest


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=pytest.mark.runs("reference", name))
        for name in ("full recompute", "selective recompute")
    ],
)
def test_recompute_is_bit_equal(runs, kind):
    reference, run = runs
    assert run.iterations == reference.iterations
    assert run.difference(reference) == 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[pytest.mark.runs("pipeline 2, 8 micro-batches", name), *marks])
        for name, *marks in (
            ("pipeline 2, 8 micro-batches, full recompute",),
            ("hybrid, pipeline 2, 8 micro-batches, full recompute", pytest.mark.slow),
        )
    ],
)
def test_recompute_in_pipeline_is_bit_equal(runs, kind):
    reference, run = runs
    assert run.iterations == reference.iterations == list(range(1, 7))
    assert run.difference(reference) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=pytest.mark.runs("pipeline 2, 8 micro-batches", name))
        for name in (
            "pipeline 2, 8 micro-batches, full recompute, stale ids",
            "hybrid, pipeline 2, 8 micro-batches, full recompute, stale ids",
        )
    ],
)
def test_ids_of_another_micro_batch_are_noticed(runs, kind):
    reference, run = runs
    assert run.iterations == reference.iterations
    assert run.curves["lm loss"][1] == reference.curves["lm loss"][1]  # the forward pass has the right ids
    assert run.curves["grad-norm"][1] != reference.curves["grad-norm"][1]
    assert run.difference(reference, ["lm loss"]) > 1e-4
