"""The order in which runs are started, by a stand-in for the processes of the runs."""

import pytest
from support.comparisons import finish_stages, leave_by_job, make_comparison

from maskmoe.comparison import execution
from maskmoe.comparison.runs import tuning_runs
from maskmoe.errors import RunFailure

SUITE = """
data: {vocab-size: 300}
flags: {num-layers: 1, hidden-size: 8, seq-length: 16, train-iters: 4, global-batch-size: 2}
learning-rates: {values: [1e-4, 1e-3, 1e-2, 1e-1], iterations: 2}
variants: {quick: {}, slow: {flags: {weight-decay: 0.2}}}
"""
# Held-out losses of the trials. The best rate is 1e-4.
LOSSES = {"1e-4": "2.1", "1e-3": "2.2", "1e-2": "2.3", "1e-1": "2.4"}


@pytest.fixture
def comparison(tmp_path):
    (tmp_path / "pair.yaml").write_text(SUITE)
    return make_comparison(tmp_path / "pair.yaml", tmp_path / "run")


def finish(comparison, run):
    """Finish a run at once, with the loss of its learning rate."""
    if run.kind != "check":
        leave_by_job(comparison, run, loss=LOSSES[run.learning_rate])
    finish_stages(comparison, run)


@pytest.fixture
def failing():
    """Names of the runs that fail."""
    return set()


@pytest.fixture
def events(comparison, failing, monkeypatch):
    """Replace processes by stand-ins, of which the trials of `slow` end late; return what happens, in order."""
    events = []

    class Process:
        def __init__(self, command, *_arguments):
            self.run = comparison.find_run(command[-1])
            self.polls = 10 if self.run.variant.name == "slow" and self.run.kind == "tuning" else 1
            self.exit_code = None
            events.append(f"start {self.run.name}")

        def new_lines(self):
            """End after some polls."""
            self.polls -= 1
            if self.polls == 0:
                events.append(f"end {self.run.name}")
                self.exit_code = int(self.run.name in failing)
                if not self.exit_code:
                    finish(comparison, self.run)
            return ["out of memory"] if self.exit_code else []

        def stop(self):
            pass

    monkeypatch.setattr(execution, "StageProcess", Process)
    monkeypatch.setattr(execution, "_POLL_SECONDS", 0)
    monkeypatch.setattr(execution, "run_stages", lambda data, line: None)
    monkeypatch.setattr(execution, "report", lambda comparison, arguments: "report")
    return events


def test_whole_run_waits_only_for_the_trials_of_its_variant(comparison, events):
    execution.compare(comparison, (), jobs=4)
    assert events.index("start runs/quick.seed-1") < events.index("end tuning/slow.lr-1e-3")
    assert events.index("start runs/slow.seed-1") > events.index("end tuning/slow.lr-1e-4")
    assert comparison.learning_rates() == {"quick": "1e-4", "slow": "1e-4"}
    assert comparison.unfinished(comparison.known_runs()) == ()


def test_all_other_runs_wait_for_the_checks(comparison, events):
    execution.compare(comparison, (), jobs=4)
    checks = [number for number, event in enumerate(events) if "checks/" in event]
    assert checks == [0, 1, 2, 3]


def test_trials_come_before_whole_runs(comparison, events):
    execution.compare(comparison, (), jobs=1)
    started = [event.removeprefix("start ") for event in events if event.startswith("start ")]
    assert [name.partition("/")[0] for name in started] == ["checks"] * 2 + ["tuning"] * 6 + ["runs"] * 2


@pytest.mark.parametrize("jobs", [1, 4])
def test_trials_do_not_depend_on_the_number_of_jobs(comparison, events, jobs):
    """While only the trial of 1e-3 is known, both neighbours must be tried. The better 1e-4 makes 1e-2 unnecessary."""
    for run in tuning_runs(comparison.suite):
        if run.learning_rate == "1e-3":
            finish(comparison, run)
    execution.compare(comparison, (), jobs=jobs)
    trials = {event for event in events if event.startswith("start tuning")}
    assert trials == {f"start tuning/{name}.lr-{rate}" for name in ("quick", "slow") for rate in ("1e-4", "1e-2")}


def test_failed_run_does_not_stop_the_runs_of_other_variants(comparison, events, failing):
    failing.add("tuning/slow.lr-1e-3")
    with pytest.raises(RunFailure, match=r"1 of 7 runs failed: tuning/slow.lr-1e-3: out of memory"):
        execution.compare(comparison, (), jobs=4)
    assert "end runs/quick.seed-1" in events
    assert not any("runs/slow" in event for event in events)
