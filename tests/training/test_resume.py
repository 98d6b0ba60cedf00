"""A run that stops and is resumed continues as if nothing had happened."""

import pytest
from support.training_runs import run_pairs

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


@pytest.mark.parametrize(
    "pair",
    run_pairs(
        ("bf16, distributed optimizer", "bf16, distributed optimizer, resumed"),
        ("saved asynchronously", "saved asynchronously, resumed"),
        ("rich", "rich, resumed"),
        slow=(
            ("muon in shares, data parallel 2, saved", "muon in shares, data parallel 2, resumed"),
            ("rich", "rich hybrid"),
            ("latent", "latent, resumed"),
            ("gated delta net", "gated delta net, resumed"),
            ("filled-in middle", "filled-in middle, resumed"),
        ),
    ),
)
def test_resume_is_bit_equal(runs, pair):
    """Data order, optimizer, learning rate and, in the runs with dropout, the random state are restored.

    The model `rich` has all load-balancing losses, and its hybrid twin continues with the optimizer of the GPT model.
    The model `latent` has an expert bias.
    The run that saves asynchronously is resumed without --routing-mask, and uses the checkpoint's mask.
    """
    uninterrupted, resumed = runs
    first = resumed.iterations[0]
    assert first in (5, 8)
    assert uninterrupted.iterations[first - 1 :] == resumed.iterations
    assert len(resumed.iterations) >= 4
    assert resumed.difference(uninterrupted) == 0


@pytest.mark.runs("evaluated often", "evaluated often, then seldom")
def test_resume_with_fewer_evaluations(runs):
    """The checkpoint has consumed more validation data than its run would have with the new flags."""
    often, seldom = runs
    assert seldom.iterations == list(range(8, 13))
    assert seldom.difference(often, ["lm loss"]) == 0
    assert 12 in seldom.curves["lm loss validation"]


# The other direction, from 1 to 2, is in test_composition.py: "expert parallel 2" loads the checkpoint of one process.
@pytest.mark.parametrize(
    "pair",
    run_pairs(
        ("experts on 2, distributed optimizer", "experts on 2, distributed optimizer, resumed on 1"),
        slow=(
            (
                "stage without experts, distributed optimizer",
                "stage without experts, distributed optimizer, resumed on 1",
            ),
            ("joint, distributed optimizer", "joint, distributed optimizer, resumed on 1"),
            (
                "joint, distributed optimizer",
                "joint, distributed optimizer, resumed as pipeline 2, expert parallel 2, data parallel 2",
            ),
        ),
    ),
)
def test_resume_in_another_layout(runs, pair):
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) < FP32_ORDER_OF_SUMS


@pytest.mark.parametrize(
    ("names", "first", "last"),
    [
        pytest.param(names, first, last, marks=pytest.mark.runs(*names), id=names[-1])
        for names, first, last in (
            (("data parallel 2, distributed optimizer", "on Transformer Engine"), 2, 4),
            (("data parallel 2, distributed optimizer", "on Transformer Engine, then local"), 5, 8),
        )
    ],
)
def test_resume_on_the_other_implementation(runs, names, first, last):
    """Checkpoints of local modules are loaded into modules of Transformer Engine, and the other way round."""
    reference, resumed = runs
    assert resumed.iterations == list(range(first, last + 1))
    assert resumed.difference(reference) < FP32_ORDER_OF_SUMS
