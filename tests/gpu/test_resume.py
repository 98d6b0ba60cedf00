"""With `--deterministic-mode`, a run that stops and resumes equals an uninterrupted run bit for bit, also on GPUs."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.paths import TESTS
from support.places import PLACES, Place
from support.training import PRETRAIN, Run, Workplace

from maskmoe.launch.machine import find_devices


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES[1:])  # One core would show no more than two cores.
def test_resume_is_bit_equal(place: Place, tmp_path: Path) -> None:
    """Runs save at iteration 7. Gradients of experts and dense layers, dropout and the optimizer take part."""
    num_ranks = math.gcd(place.num_ranks(), 8)  # experts and samples of a batch
    flags = [
        "--deterministic-mode --bf16 --hidden-dropout 0.1 --attention-dropout 0.1 --exit-interval 12",
        f"--micro-batch-size 1 --expert-model-parallel-size {num_ranks}",
        *(find_devices().megatron_flags if place.is_gpu else []),
    ]
    program = PRETRAIN if place.is_gpu else (str(TESTS / "training" / "pretrain_with_gpu_branches.py"),)
    whole = Run(" ".join(flags), ranks=num_ranks, saves=True, program=program, sees_gpus=place.is_gpu)
    resumed = replace(whole, flags=f"{whole.flags} --ckpt-step 7", saves=False)
    workplace = Workplace(tmp_path)
    uninterrupted = workplace.run(whole, tmp_path / "whole")
    assert set(uninterrupted.exit_codes) == {0}, uninterrupted.report()
    outcome = workplace.run(resumed, tmp_path / "resumed", uninterrupted.checkpoints)
    assert set(outcome.exit_codes) == {0}, outcome.report()
    assert uninterrupted.iterations == list(range(1, 13))
    assert outcome.iterations == list(range(8, 13))
    assert outcome.difference(uninterrupted) == 0
