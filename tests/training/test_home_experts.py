"""Training with raised logits of home experts."""

from dataclasses import replace

import pytest

pytestmark = pytest.mark.slow

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs("home experts", name))
        for name in (
            "home experts, expert parallel 2",
            "home experts, tensor 2, expert parallel 2, all-gather",
        )
    ],
)
def test_layout_agrees_with_single_process(runs, name):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("home experts", "home experts, resumed")
def test_resume_is_bit_equal(runs):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference) == 0


def test_mask_without_homes_is_refused(start, refusal):
    run = replace(refusal.run, flags="--home-expert-logit 3")
    message = refusal(start("home logit without homes", run))
    assert "--home-expert-logit needs a routing mask with home experts" in message


@pytest.mark.runs("home experts")
def test_another_home_logit_is_refused(runs, start, refusal):
    (reference,) = runs
    run = replace(refusal.run, flags=f"--load {reference.checkpoints}", mask="homes.safetensors", saves=False)
    message = refusal(start("another home logit", run))
    assert "--home-expert-logit 3.0 in the checkpoint, 0.0 in this run" in message
