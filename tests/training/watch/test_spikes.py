"""The detector of spikes against numpy, and spikes that are reported in real training runs."""

import math
import re
from argparse import Namespace
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.paths import TESTS
from support.runs import read_scalars
from support.training import Run, TrainingOutcome
from support.training_runs import DISTRIBUTED, EXPERT_2, PIPELINE_2

from maskmoe.checkpoint.reading import read_common_state
from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.training.watch import spikes
from maskmoe.training.watch.callback import Step
from maskmoe.training.watch.spikes import SpikeWatch, robust_deviations

VALUES = st.floats(-1e6, 1e6)


@pytest.fixture
def watch(monkeypatch, capsys):
    """Return a function that judges steps, and returns the lines that it prints."""
    monkeypatch.setattr(spikes, "is_last_rank", lambda: True)

    def judge(callback: SpikeWatch, *steps: tuple[float, float | None]) -> list[str]:
        for loss, norm in steps:
            callback.after_step(Step(1, 8, {"lm loss": torch.tensor(loss, dtype=torch.float64)}, norm, True))
        return capsys.readouterr().out.splitlines()

    return judge


def make_watch(window: int, limit: float) -> SpikeWatch:
    return SpikeWatch(Namespace(spike_window=window, spike_deviations=limit))


@given(st.lists(VALUES, min_size=1, max_size=60), VALUES)
def test_deviations_agree_with_numpy(before, value):
    middle = np.median(before)
    spread = 1.4826 * np.median(np.abs(np.array(before) - middle))
    expected = (value - middle) / max(spread, 0.005 * abs(middle), 1e-6)
    assert robust_deviations(value, before) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_values_are_judged_from_half_a_window_on(watch):
    callback = make_watch(window=8, limit=15)
    assert not watch(callback, *[(2.0, 0.5)] * 3, (9.0, None), *[(2.0, 0.5)] * 4)
    assert watch(callback, (9.0, 0.1), (2.0, 0.5)) == [
        "warning: iteration 1 is off: loss 9, 700.0 robust deviations above the median 2; "
        "gradient norm 0.1, 160.0 robust deviations below the median 0.5"
    ]


def test_lasting_change_of_the_level_is_normal_after_half_a_window(watch):
    callback = make_watch(window=8, limit=15)
    watch(callback, *[(2.0, 0.5)] * 8)
    assert len(watch(callback, *[(9.0, 0.5)] * 8)) == 4


def test_normal_noise_on_a_falling_curve_is_not_off(watch):
    generator = np.random.default_rng(0)
    losses = (2 + 9 * math.exp(-step / 300) + 0.03 * generator.standard_normal() for step in range(2000))
    norms = (0.3 * math.exp(0.2 * generator.standard_normal()) for _ in range(2000))
    assert not watch(make_watch(128, 15), *zip(losses, norms, strict=True))


# In training

SPIKE = (str(TESTS / "training" / "pretrain_with_spike.py"),)
WINDOW = "--spike-window 8"
TAGS = ("spike/loss", "spike/grad-norm")

StartSpiky = Callable[..., TrainingOutcome]


@pytest.fixture
def run_spiky(workplace, tmp_path) -> StartSpiky:
    """Run with spikes to the end. All starts of one test use one folder of checkpoints."""

    def run_spiky(flags: str, spikes: str, name: str = "run", ranks: int = 2) -> TrainingOutcome:
        folders = f"--save {tmp_path}/save --load {tmp_path}/save"
        run = Run(f"{WINDOW} {folders} {flags}", program=SPIKE, ranks=ranks)
        with workplace.start(run, tmp_path / name, environment={"SPIKES": spikes}, are_preloaded=True) as processes:
            return processes.wait(all_end=True)

    return run_spiky


def warnings_of(outcome: TrainingOutcome) -> list[str]:
    """Return the lines on the console that begin with a warning of a step."""
    return re.findall(r"^(?:\[rank\d\]: ?)?warning: (iteration .* is off.*)$", outcome.output, re.MULTILINE)


def test_report(run_spiky, tmp_path):
    """One step is off. The last rank reports the step, once, and the checkpoint holds the steps that it has seen."""
    outcome = run_spiky(f"{EXPERT_2} {DISTRIBUTED} --exit-interval 14", "12")
    assert outcome.exit_codes == (0, 0), outcome.report()
    (line,) = warnings_of(outcome)
    assert re.fullmatch(
        r"iteration 12 is off: loss [\d.]+, [\d.]+ robust deviations above the median [\d.]+; "
        r"gradient norm [\d.]+, [\d.]+ robust deviations above the median [\d.]+",
        line,
    ), line
    scalars = read_scalars(outcome.folder)
    assert {tag: [event.step for event in scalars[tag]] for tag in TAGS} == {tag: [12] for tag in TAGS}
    history = read_common_state(checkpoint_path(tmp_path / "save", 14))["callbacks"]["SpikeWatch"]["history"]
    for name, scalar in (("loss", "lm loss"), ("gradient norm", "grad-norm")):
        assert history[name] == pytest.approx([*outcome.curves[scalar].values()][-8:], rel=1e-6)


@pytest.mark.slow
def test_watch_does_not_change_the_training(run_spiky, tmp_path):
    unwatched = run_spiky(f"{EXPERT_2} --spike-deviations inf --save-interval 99", "12")
    assert warnings_of(unwatched) == []
    watched = run_spiky(
        f"{EXPERT_2} --save {tmp_path}/other --load {tmp_path}/other --save-interval 99", "12", "watched"
    )
    assert len(warnings_of(watched)) == 1
    assert watched.difference(unwatched) == 0


@pytest.mark.slow
def test_resumed_run_knows_the_steps_before(run_spiky):
    """Two steps after the checkpoint are too few for a judgement."""
    first = run_spiky(f"{PIPELINE_2} --exit-interval 10", "12", name="first")
    assert first.exit_codes == (0, 0), first.report()
    assert warnings_of(first) == []
    resumed = run_spiky(EXPERT_2, "12", name="resumed")
    assert resumed.iterations == list(range(11, 22))
    assert len(warnings_of(resumed)) == 1
