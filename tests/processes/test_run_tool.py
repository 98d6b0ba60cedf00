"""How `run_tool` reports errors of the operating system, long errors, and a closed output."""

import errno
import os
import subprocess
import sys
import time

import pytest
from support.paths import ROOT

from maskmoe.errors import RunFailure, UserError
from maskmoe.processes.run_tool import run_tool


def run_failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run a function that raises an exception by `run_tool`; return the exit code."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["maskmoe"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    with pytest.raises(SystemExit) as end:
        run_tool(fail)
    return end.value.code


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    """The process is no rank, unless a test makes it one."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(("number", "code"), [(errno.ENOENT, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 1)])
def test_error_of_the_system_is_one_line(monkeypatch, capsys, number, code):
    assert run_failing(OSError(number, os.strerror(number), "data/config.json"), monkeypatch) == code
    assert capsys.readouterr().err == f"error: data/config.json: {os.strerror(number)}\n"


@pytest.mark.parametrize(
    "error", [OSError("without a number"), ValueError("ours"), BrokenPipeError(errno.EPIPE, "of a child")]
)
def test_error_of_the_program_keeps_its_traceback(monkeypatch, error):
    with pytest.raises(type(error)):
        run_failing(error, monkeypatch)


@pytest.mark.parametrize("kind", [UserError, RunFailure])
def test_error_is_one_short_line(monkeypatch, capsys, kind):
    run_failing(kind(f"first\nsecond\x1b[31m {'n' * 5000} end"), monkeypatch)
    printed = capsys.readouterr().err
    assert printed.startswith("error: first second\\x1b[31m nnn")
    assert printed.endswith("nnn end\n")
    assert len(printed) < 400


def test_nothing_follows_the_error():
    program = "from maskmoe.processes.run_tool import run_tool; from maskmoe.errors import UserError\n"
    program += "class File:\n def __del__(self): raise ValueError('flush of closed file')\n"
    program += "def main(file=File()): raise UserError('bad')\n"
    program += "run_tool(main)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (2, "error: bad\n")


@pytest.mark.parametrize(
    ("redirection", "code", "errors"),
    [("| true", 141, ""), ("> /dev/full", 1, "error: No space left on device\n"), ("| cat > /dev/null", 0, "")],
)
def test_output_that_nobody_reads(redirection, code, errors):
    program = "from maskmoe.processes.run_tool import run_tool\n"
    program += "run_tool(lambda: [print('line' * 100) for _ in range(10**5)])"
    command = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", command, sys.executable, program]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (code, errors)


def test_rank_that_alone_finds_bad_input_reports_it(monkeypatch, capsys):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_failing(UserError("only here"), monkeypatch) == 2
    assert capsys.readouterr().err == "error: only here\n"
    assert len(waits) == 1
