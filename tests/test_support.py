"""Helpers of the tests fail where a test that uses them must fail."""

import math
from pathlib import Path

import pytest
from support.command_lines import Outcome, refuse_all, writing_nothing
from support.launchers import run_as_ranks, start_ranks
from support.runs import write_scalars
from support.system import wait_until
from support.training import TrainingOutcome


def test_refusals_need_a_case(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no case"):
        refuse_all(tmp_path, [])
    with pytest.raises(AssertionError, match="1 of 1 cases failed"):
        refuse_all(tmp_path, [(["--version"], [])])


@pytest.mark.parametrize(
    ("outcome", "is_refusal"),
    [
        (Outcome(2, "", "error: --lr is negative\n"), True),
        (Outcome(2, "", "loading: torch\nerror: --lr is negative\n"), True),
        (Outcome(1, "", "error: --lr is negative\n"), False),
        (Outcome(2, "", "error: --lr is negative\nand more\n"), False),
        (Outcome(2, "", "--lr is negative\n"), False),
        (Outcome(2, "", "error: --min-lr is negative\n"), False),
    ],
)
def test_refusal_is_one_line_that_names_its_cause(outcome: Outcome, is_refusal: bool) -> None:
    assert (outcome.problem("--lr is") is None) is is_refusal


def test_changed_content_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "tracker").write_text("14")
    with pytest.raises(AssertionError), writing_nothing(tmp_path):
        (tmp_path / "tracker").write_text("21")


def outcome_of(folder: Path, losses: list[float], others: tuple[str, ...] = ("z_loss",)) -> TrainingOutcome:
    write_scalars(folder / "tensorboard", {name: [*enumerate(losses)] for name in ("lm loss", *others)})
    return TrainingOutcome((0,), ("",), folder)


def test_runs_differ_in_a_value_or_a_missing_curve(tmp_path: Path) -> None:
    run = outcome_of(tmp_path / "run", [2.0, 1.0])
    assert run.difference(outcome_of(tmp_path / "same", [2.0, 1.0])) == 0
    assert run.difference(outcome_of(tmp_path / "other", [2.0, 1.1])) > 0.05
    assert not run.difference(outcome_of(tmp_path / "nan", [2.0, math.nan])) < 1
    with pytest.raises(AssertionError):
        run.difference(outcome_of(tmp_path / "fewer", [2.0, 1.0], ()))


def fail() -> None:
    raise ValueError("a rank fails")


def test_failing_ranks_and_vain_waits_fail_the_test(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="a rank fails"):
        run_as_ranks(fail, tmp_path, world_size=1, joins=False)
    with pytest.raises(pytest.fail.Exception, match="in vain"):
        wait_until(lambda: False, timeout=0.1)


@pytest.mark.parametrize(
    ("program", "code", "output"),
    [
        ("import atexit; atexit.register(print, 'bye'); print('end', end=' ')", 0, "end bye\n"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('bad')", 1, "bad\n"),
        ("raise ValueError('no')", 1, "ValueError: no\n"),
    ],
)
def test_preloaded_program_ends_as_another(tmp_path: Path, program: str, code: int, output: str) -> None:
    (tmp_path / "program.py").write_text(program)
    with start_ranks(["program.py"], tmp_path, are_preloaded=True) as processes:
        outcome = processes.wait()
    assert outcome.exit_codes == (code,)
    assert outcome.output.endswith(output)
