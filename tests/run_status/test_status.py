"""`maskmoe status`: the lines of a run, of a run whose folders lie elsewhere, and of damaged folders."""

import shutil
import subprocess
import sys
from unittest.mock import ANY

import pytest
from support.command_lines import run_command, writing_nothing
from support.runs import write_arguments, write_checkpoint, write_events

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


def test_folders_elsewhere_are_those_of_the_arguments(tmp_path):
    write_events(tmp_path / "events", last=3)
    write_checkpoint(tmp_path / "save", 3)
    write_arguments(tmp_path / "run", save=tmp_path / "save", tensorboard_dir=tmp_path / "events", train_iters="many")
    progress, _, restart, _ = status_lines(tmp_path / "run")
    assert progress.startswith("run: iteration 3, loss 1.6667, 0.25 s an iteration")
    assert restart == "a restart loads iter_0000003"
    # Paths are relative to the folder in which the run was started.
    write_arguments(tmp_path / "run", f"# Relative paths are relative to {tmp_path}", save="save", load="other")
    assert [*status_lines(tmp_path / "run")][2:] == [f"every start loads from {tmp_path}/other", ANY]


def test_a_run_that_has_just_begun(tmp_path):
    write_arguments(tmp_path / "run")
    assert [*status_lines(tmp_path / "run")] == [
        "run: nothing has been logged yet",
        "no process works in the folder",
        "a restart begins at the first iteration",
    ]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\0", b"# save: \0", b"# train_iters: " + b"9" * 5000, b"# save: /dev/null"]
)
def test_damaged_arguments(run, content):
    (run / "args.yaml").write_bytes(content)
    assert [*status_lines(run)][2] == "a restart loads iter_0000020"


def test_another_folder_is_refused(tmp_path):
    run_command("status", tmp_path).assert_refused("is not the folder of a run")
