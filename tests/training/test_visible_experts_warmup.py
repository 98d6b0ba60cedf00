"""Training with a warm-up of visible experts."""

import json
from dataclasses import replace

import pytest

pytestmark = pytest.mark.slow

# See test_composition.py.
FP32_ORDER_OF_SUMS = 2e-6

# The z-loss is 0 during the warm-up, so relative differences do not exist.
SCALARS = ("lm loss", "load_balancing_loss", "grad-norm")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs("warm-up of visible experts", name))
        for name in ("warm-up of visible experts, resumed", "warm-up of visible experts, full recompute")
    ],
)
def test_run_is_bit_equal(runs, name):
    """Both runs continue from iteration 4. The warm-up ends after iteration 6."""
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference, SCALARS) == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.runs("warm-up of visible experts", name))
        for name in (
            "warm-up of visible experts, pipeline 2, full recompute",
            "warm-up of visible experts, expert parallel 2",
            "warm-up of visible experts, tensor 2, expert parallel 2, room for all",
        )
    ],
)
def test_layout_agrees_with_single_process(runs, name):
    reference, run = runs
    assert run.iterations == list(range(5, 9))
    assert run.difference(reference, SCALARS) < FP32_ORDER_OF_SUMS


@pytest.mark.runs("warm-up of visible experts")
def test_z_loss_appears_after_the_warm_up(runs):
    """The z-loss is over tokens with several visible experts."""
    (reference,) = runs
    z_loss = reference.curves["z_loss"]
    assert [iteration for iteration, value in z_loss.items() if value > 0] == [7, 8]


@pytest.mark.parametrize(("iteration", "in_warm_up"), [(4, True), (8, False)])
@pytest.mark.runs("warm-up of visible experts")
def test_evaluation_sees_the_experts_of_the_last_trained_iteration(runs, workplace, tmp_path, iteration, in_warm_up):
    (reference,) = runs
    flags = f"""
        --load {reference.checkpoints} --ckpt-step {iteration} --use-checkpoint-args --data-path data --split 90,10,0
        --tokenizer-type NullTokenizer --vocab-size 510 --token-frequency counts.safetensors
        --data-cache-path {tmp_path / "cache"} --eval-output {tmp_path / "evaluation.json"}
    """
    outcome = workplace.execute(["-m", "maskmoe.training.evaluate", *flags.split()], tmp_path)
    assert outcome.exit_codes == (0,), outcome.report()
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for load in evaluation["expert_load"]:
        assert (sum(load["tokens_per_expert"]) == evaluation["tokens"]) == in_warm_up


def test_mask_without_homes_is_refused(start, refusal):
    run = replace(refusal.run, flags="--visible-experts-warmup-iters 3")
    message = refusal(start("warm-up without homes", run))
    assert "--visible-experts-warmup-iters needs a routing mask with home experts" in message
