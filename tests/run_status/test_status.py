"""`maskmoe status`: the lines of a run, and of damaged folders."""

import shutil
import subprocess
import sys

import pytest
from support.command_lines import run_command, writing_nothing

from maskmoe.run_status.status import status_lines

LOCKED = """
import sys
from pathlib import Path
from maskmoe.processes.folder_lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_status_of_a_run(run):
    with writing_nothing(run):
        outcome = run_command("status", run, "--verify")
    progress, lock, restart, *checkpoints = outcome.output.splitlines()
    assert progress == (
        "my run: iteration 20 of 40, loss 0.2500, held-out 0.3000 at iteration 20, 0.25 s an iteration, "
        "0:00:05 of training left"
    )
    assert lock == "no process works in the folder"
    assert restart == "a restart loads iter_0000020"
    assert [(line.split()[0], line.split()[-1]) for line in checkpoints] == [
        ("iter_0000020", "verified"),
        ("iter_0000010", "verified"),
    ]


def test_a_damaged_checkpoint_is_not_what_a_restart_loads(run):
    (run / "checkpoints" / "iter_0000020" / "metadata.json").unlink()
    lines = [*status_lines(run)]
    assert lines[2] == "a restart loads iter_0000010"
    assert "iter_0000020" in lines[3]
    assert "it has no metadata.json" in lines[3]
    shutil.rmtree(run / "checkpoints" / "iter_0000010")
    assert [*status_lines(run)][2].startswith("a restart would be refused: ")


def test_a_process_that_works_in_the_folder_is_named(run):
    words = [sys.executable, "-c", LOCKED, run / "checkpoints"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        assert f"process {process.pid} on host" in [*status_lines(run)][1]
        process.stdin.close()


@pytest.mark.parametrize("content", [b"\xff\0", b"# train_iters: " + b"9" * 5000])
def test_damaged_arguments(run, content):
    (run / "args.yaml").write_bytes(content)
    assert [*status_lines(run)][2] == "a restart loads iter_0000020"


def test_another_folder_is_refused(tmp_path):
    run_command("status", tmp_path).assert_refused("is not the folder of a run")
