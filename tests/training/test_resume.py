"""A run that stops and is resumed continues as if nothing had happened."""

import pytest

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


@pytest.mark.runs("reference", "resumed from start")
def test_resume_after_stop_is_bit_equal(runs):
    """Without --routing-mask: the checkpoint's is used."""
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(2, 22))
    assert resumed.difference(uninterrupted) == 0


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[pytest.mark.runs(name, f"{name}, resumed"), *marks])
        for name, *marks in [
            ("fp32",),
            ("bf16", pytest.mark.slow),
            ("fp32, distributed optimizer", pytest.mark.slow),
            ("bf16, distributed optimizer",),
            ("experts on 2", pytest.mark.slow),
            ("experts on 2, distributed optimizer", pytest.mark.slow),
            ("saved asynchronously",),
        ]
    ],
)
def test_resume_is_bit_equal(runs, kind):
    """Data order, optimizer, learning rate and, in the runs with dropout, random state."""
    uninterrupted, resumed = runs
    assert uninterrupted.iterations == list(range(1, 13))
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) == 0


# The other direction, from 1 to 2, is in test_composition.py: "expert parallel 2" loads what a single process saved.
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(name, marks=[pytest.mark.runs(name, f"{name}, resumed on 1"), *marks])
        for name, *marks in [("experts on 2", pytest.mark.slow), ("experts on 2, distributed optimizer",)]
    ],
)
def test_resume_with_fewer_expert_parallel_ranks(runs, kind):
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) < FP32_ORDER_OF_SUMS


@pytest.mark.parametrize(
    "layouts",
    [
        pytest.param((first, second), marks=[pytest.mark.runs(first, f"{first}, resumed {second}"), *marks])
        for first, second, *marks in [
            ("tensor 2", "as pipeline 2"),
            ("joint", "on 1", pytest.mark.slow),
            ("joint", "as pipeline 4", pytest.mark.slow),
            ("joint, distributed optimizer", "on 1", pytest.mark.slow),
            (
                "joint, distributed optimizer",
                "as pipeline 2, expert parallel 2, data parallel 2",
                pytest.mark.slow,
            ),
        ]
    ],
)
def test_resume_in_another_layout(runs, layouts):
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) < FP32_ORDER_OF_SUMS
