"""Forks of a process that has imported Megatron-Core behave like new processes of Python."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.launchers import CPU_ENVIRONMENT, preloaded_python, start_python
from support.paths import python_path
from support.preloaded import ForkedProcess

PROBE = """
import atexit, json, os, sys, time
atexit.register(print, "at exit")
values = sys.argv, os.getcwd(), sys.path[:3], sorted(os.environ.items()), __name__, os.getpgrp() == os.getpid()
assert sys.modules["__main__"].__dict__ is globals()
print(json.dumps(values))
print("to stderr", file=sys.stderr)
if sys.argv[1] == "sleep":
    time.sleep(1000)
sys.exit(sys.argv[1] or 0)
"""

MODULE = ("-m", "probe")


@pytest.fixture
def start(tmp_path: Path):
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, **CPU_ENVIRONMENT, "PROBED": "å", "PYTHONPATH": python_path(tmp_path / "elsewhere")}

    def start(
        argument: str, name: str, program: tuple[str, ...] = MODULE, is_preloaded: bool = True
    ) -> ForkedProcess | subprocess.Popen:
        program = (*program, argument)
        with open(tmp_path / f"{name}.out", "w") as out, open(tmp_path / f"{name}.err", "w") as err:
            return start_python(program, tmp_path, environment, out, err, is_preloaded)

    return start


@pytest.mark.parametrize("program", [MODULE, ("probe.py",)])
@pytest.mark.parametrize("argument", ["", "reason"])
def test_equals_a_new_process(start, tmp_path, argument, program):
    fork, new = start(argument, "fork", program), start(argument, "new", program, is_preloaded=False)
    assert fork.wait() == new.wait() == (1 if argument else 0)
    for suffix in ("out", "err"):
        assert (tmp_path / f"fork.{suffix}").read_text() == (tmp_path / f"new.{suffix}").read_text() != ""
    assert fork.poll() == fork.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signal_ends_a_fork(start, tmp_path, number):
    fork = start("sleep", "fork")
    assert fork.poll() is None
    os.killpg(fork.pid, number)
    assert fork.wait() == -number


def test_error_is_a_traceback(tmp_path):
    (tmp_path / "faulty.py").write_text("raise ValueError('here')")
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        fork = preloaded_python().start(["-m", "faulty"], tmp_path, {**os.environ}, out, err)
        assert fork.wait() == 1
    assert (tmp_path / "err").read_text().endswith("ValueError: here\n")
