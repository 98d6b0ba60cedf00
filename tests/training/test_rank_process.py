"""The end of the process of a rank: its exit code, its last lines, and its exit handlers."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from maskmoe.processes.console import console
from maskmoe.training.rank_process import run_rank
def main():
    print("Megatron says why")
    {end}
run_rank(main, "pretrain")
"""


def run(end: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program, whose main function ends with the statements `end`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("end", "code", "last", "is_explained"),
    [
        ("raise ValueError('boom')", 1, "ValueError: boom", False),
        ("sys.exit(3)", 3, "Megatron says why", False),
        ("from maskmoe.errors import UserError; raise UserError('bad flag')", 2, "error: bad flag", True),
        ("from maskmoe.errors import RunFailure; raise RunFailure('full disk')", 1, "error: full disk", True),
    ],
)
def test_last_words_of_a_process_are_shown(end, code, last, is_explained):
    """A process that ends while it loads, for a reason that we do not explain, shows its newest hidden lines."""
    process = run(end, RANK="0", LOCAL_RANK="0")
    assert process.returncode == code, process.stderr
    assert process.stderr.splitlines()[-1] == last
    assert ("Megatron says why" in process.stderr) != is_explained
    assert process.stdout == ""


def test_process_ends_after_all_exit_handlers():
    """Threads that live on, and handlers that were registered during the run, end before the process does."""
    process = run(
        "import atexit, threading, time; atexit.register(print, 'handler', file=sys.stderr)\n"
        "    threading.Thread(target=lambda: (time.sleep(0.3), print('thread', file=sys.stderr))).start()"
    )
    assert (process.returncode, process.stderr) == (0, "thread\nhandler\n")


def test_help_that_nobody_reads():
    command = f"{sys.executable} -m maskmoe pretrain --help | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (141, "")
