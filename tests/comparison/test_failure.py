"""The line of a log that says why a command failed."""

import pytest

from maskmoe.comparison.failure import explain_failure
from maskmoe.errors import RunFailure, UserError


def test_bad_input_comes_before_its_consequences():
    lines = [
        "W1124 torch/distributed/run.py] Setting OMP_NUM_THREADS",
        "error: dataset data does not exist",
        "Traceback (most recent call last):",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    ]
    failure = explain_failure(1, lines)
    assert (str(failure), type(failure)) == ("dataset data does not exist", UserError)


@pytest.mark.parametrize("program", ["x.py", "maskmoe", "maskmoe preprocess", "__main__.py mask"])
def test_bad_flag_is_bad_input(program):
    failure = explain_failure(2, [f"usage: {program}", f"{program}: error: bad flag"])
    assert (str(failure), type(failure)) == ("bad flag", UserError)


def test_first_rank_to_fail_gives_the_reason():
    lines = [
        "[rank1]: Traceback (most recent call last):",
        "[rank1]: ValueError: the weights are wrong",
        "[rank0]: RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1",
        "raise ChildFailedError(",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    ]
    failure = explain_failure(1, lines)
    assert (str(failure), type(failure)) == ("ValueError: the weights are wrong", RunFailure)


@pytest.mark.parametrize(
    ("exit_code", "lines", "message"),
    [
        (1, ["traceback : Signal 9 (SIGKILL) received by PID 9"], "a process was killed"),
        (-9, [], "a process was killed"),
        (1, ["the last line", ""], "the last line"),
        (3, [], "exit code 3"),
    ],
)
def test_failure_without_an_exception(exit_code, lines, message):
    failure = explain_failure(exit_code, lines)
    assert str(failure).startswith(message)
    assert type(failure) is RunFailure
