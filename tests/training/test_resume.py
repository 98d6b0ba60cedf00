"""A run that stops and is resumed continues as if nothing had happened."""

import pytest

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


def pairs(*names: tuple[str, str], slow: tuple[tuple[str, str], ...] = ()) -> list:
    """Return parameters for pairs of an uninterrupted and a resumed run, and mark each with the names of its runs."""
    return [
        pytest.param(pair, marks=[pytest.mark.runs(*pair), *([pytest.mark.slow] if pair in slow else [])], id=pair[1])
        for pair in (*names, *slow)
    ]


@pytest.mark.runs("reference", "resumed from start")
def test_resume_after_stop_is_bit_equal(runs):
    """The resumed run has no --routing-mask and uses the checkpoint's mask."""
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(2, 22))
    assert resumed.difference(uninterrupted) == 0


@pytest.mark.parametrize(
    "pair",
    pairs(
        ("bf16, distributed optimizer", "bf16, distributed optimizer, resumed"),
        ("saved asynchronously", "saved asynchronously, resumed"),
        slow=(
            ("stage without experts, distributed optimizer", "stage without experts, distributed optimizer, resumed"),
            ("fp32", "fp32, resumed"),
            ("bf16", "bf16, resumed"),
            ("fp32, distributed optimizer", "fp32, distributed optimizer, resumed"),
            ("experts on 2", "experts on 2, resumed"),
            ("experts on 2, distributed optimizer", "experts on 2, distributed optimizer, resumed"),
            ("muon in shares, data parallel 2, saved", "muon in shares, data parallel 2, resumed"),
        ),
    ),
)
def test_resume_is_bit_equal(runs, pair):
    """Data order, optimizer, learning rate and, in the runs with dropout, the random state are restored."""
    uninterrupted, resumed = runs
    assert uninterrupted.iterations == list(range(1, 13))
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) == 0


@pytest.mark.parametrize(
    "pair",
    pairs(
        ("evaluated often", "evaluated often, then seldom"),
        slow=(("evaluated often", "evaluated often, then at the end"),),
    ),
)
def test_resume_with_fewer_evaluations(runs, pair):
    """The checkpoint has consumed more validation data than its run would have with the new flags."""
    often, seldom = runs
    assert seldom.iterations == list(range(8, 13))
    assert seldom.difference(often, ["lm loss"]) == 0
    assert 12 in seldom.curves["lm loss validation"]


# The other direction, from 1 to 2, is in test_composition.py: "expert parallel 2" loads the checkpoint of one process.
@pytest.mark.parametrize(
    "pair",
    pairs(
        ("experts on 2, distributed optimizer", "experts on 2, distributed optimizer, resumed on 1"),
        slow=(("experts on 2", "experts on 2, resumed on 1"),),
    ),
)
def test_resume_with_fewer_expert_parallel_ranks(runs, pair):
    uninterrupted, resumed = runs
    assert resumed.iterations == list(range(8, 13))
    assert resumed.difference(uninterrupted) < FP32_ORDER_OF_SUMS


@pytest.mark.parametrize(
    "pair",
    pairs(
        ("stage without experts, distributed optimizer", "stage without experts, distributed optimizer, resumed on 1"),
        slow=(
            ("tensor 2", "tensor 2, resumed as pipeline 2"),
            ("joint", "joint, resumed on 1"),
            ("joint", "joint, resumed as pipeline 4"),
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
        pytest.param(names, first, last, marks=[pytest.mark.runs(*names), *marks], id=names[-1])
        for names, first, last, marks in (
            (("data parallel 2, distributed optimizer", "on Transformer Engine"), 2, 4, ()),
            (("data parallel 2, distributed optimizer", "on Transformer Engine, then local"), 5, 8, ()),
            (("reference", "on Transformer Engine, experts one by one"), 2, 8, [pytest.mark.slow]),
            (("reference", "on Transformer Engine, experts one by one, then local"), 9, 12, [pytest.mark.slow]),
            (("reference", "hybrid on Transformer Engine"), 2, 8, [pytest.mark.slow]),
            (("reference", "hybrid on Transformer Engine, then local"), 9, 12, [pytest.mark.slow]),
        )
    ],
)
def test_resume_on_the_other_implementation(runs, names, first, last):
    """The checkpoint of local modules is loaded into Transformer Engine's, whose checkpoint is loaded into local ones.

    The slow runs save the state of Megatron's plain optimizer. The hybrid model takes the checkpoint of its GPT twin.
    """
    reference, resumed = runs
    assert resumed.iterations == list(range(first, last + 1))
    assert resumed.difference(reference) < FP32_ORDER_OF_SUMS
