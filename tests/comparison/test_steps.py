"""Steps run once, are repeated with what they wrote before kept, and their processes end with them."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from support.system import wait_until

from maskmoe.comparison.steps import Step, run_steps
from maskmoe.errors import RunFailure, UserError

APPEND = "import os, sys; open(sys.argv[1], 'a').write('x'); print(os.environ.get('NAME'))"
SETTINGS = {"lr": "1e-2"}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def step(folder, name="append", program=APPEND, *words, environment=None):
    command = (sys.executable, "-c", program, str(folder / f"{name}.out"), *words)
    return Step(name, command, folder / f"{name}.out", environment or {})


def run(folder, *steps, settings=SETTINGS, files=None):
    asyncio.run(run_steps(folder, settings, steps, files))


def test_a_step_that_is_done_does_not_run_again(folder, capsys):
    both = (step(folder, "one", environment={"NAME": "value"}), step(folder, "two"))
    run(folder, *both, files={folder / "input": "text"})
    assert capsys.readouterr().out == "run: one\nrun: two\n"
    assert ((folder / "logs" / "one.log").read_text(), (folder / "input").read_text()) == ("value\n", "text")
    # Another Python, as in a container, repeats nothing.
    run(folder, *(replace(each, command=("/other/python", *each.command[1:])) for each in both))
    assert capsys.readouterr().out == ""
    assert (folder / "two.out").read_text() == "x"
    (folder / "one.out").unlink()
    run(folder, *both)
    assert capsys.readouterr().out == "run: one\n"


def test_a_changed_command_line_repeats_its_step(folder, capsys):
    run(folder, step(folder, "one"), step(folder, "two"))
    capsys.readouterr()
    run(folder, step(folder, "one"), step(folder, "two", APPEND, "more"))
    assert capsys.readouterr().out == "run: two\n"


def test_a_folder_of_other_settings_is_refused(folder):
    run(folder, step(folder))
    with pytest.raises(UserError, match="made with other settings"):
        run(folder, step(folder), settings={"lr": "2e-2"})
    assert (folder / "append.out").read_text() == "x"


def test_a_folder_of_something_else_is_refused(folder):
    folder.mkdir()
    (folder / "append.out").write_text("precious")
    with pytest.raises(UserError, match=r"holds append\.out, which no comparison wrote"):
        run(folder, step(folder))
    assert [path.name for path in folder.iterdir()] == ["append.out"]


@pytest.mark.parametrize(
    ("program", "error", "words"),
    [
        ("import sys; print('x error: no ids'); print('later'); sys.exit(2)", UserError, "append: no ids (exit code 2"),
        ("raise RuntimeError('no memory')", RunFailure, "append: RuntimeError: no memory (exit code 1"),
        ("import os; os.kill(os.getpid(), 9)", RunFailure, "append: no output (exit code -9"),
        ("pass", RunFailure, "append has not written"),
    ],
)
def test_a_failed_step_says_why_and_runs_again(folder, program, error, words):
    with pytest.raises(error, match=re.escape(words)):
        run(folder, step(folder, "append", program))
    run(folder, step(folder))
    assert (folder / "append.out").read_text() == "x"


STEPS = """
import asyncio, sys
from pathlib import Path
from maskmoe.comparison.steps import Step, run_steps
folder = Path(sys.argv[1])
program = "import sys, time; open(sys.argv[1], 'w').write('x'); time.sleep(600)"
step = Step("sleep", (sys.executable, "-c", program, str(folder / "started")), folder / "never")
asyncio.run(run_steps(folder, {}, [step]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_command_ends_with_its_process(folder, number):
    process = subprocess.Popen([sys.executable, "-c", STEPS, folder], stderr=subprocess.DEVNULL)
    wait_until((folder / "started").exists, has_ended=lambda: process.poll() is not None)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(timeout=60)
    with suppress(psutil.TimeoutExpired):
        psutil.wait_procs(children, timeout=30)
    assert children
    assert not any(os.path.exists(f"/proc/{child.pid}") and child.status() != "zombie" for child in children)
