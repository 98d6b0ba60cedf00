"""Torchrun without its own report of failures."""

import argparse
import signal
import sys

import pytest
from support.launch import Launch
from support.runs import free_port
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from maskmoe.files.run_folder import RUN_FOLDER_VARIABLE, Kind, read_journal
from maskmoe.launch.ranks import describe, find_cause, parse_arguments

RANK = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("rank 1 says why", file=sys.stderr, flush=True)
    raise ValueError('boom')
time.sleep(1000)
"""


def failure(exit_code: int, timestamp: int = 0) -> ProcessFailure:
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=exit_code, error_file="<N/A>")
    failure.timestamp = timestamp
    return failure


def test_failed_run_ends_with_the_cause(tmp_path):
    (tmp_path / "stub.py").write_text(RANK)
    words = ["--standalone", "--nproc-per-node", "2", "--log-dir", "logs", "--redirects", "3", "--tee", "3"]
    (tmp_path / "logs").mkdir()
    command = [sys.executable, "-m", "maskmoe.launch.ranks", *words, "--monitor-interval", "0.2", "-m", "stub"]
    variables = {"PYTHONPATH": ":".join([".", *sys.path]), RUN_FOLDER_VARIABLE: str(tmp_path / "run")}
    with Launch([*command[:3], "--max-restarts", "1", *command[3:]], tmp_path, tmp_path / "run", variables) as launch:
        assert launch.wait() == 1
    entries = [(entry.kind, entry.text.partition(";")[0]) for entry in read_journal(launch.run_dir)]
    assert entries == [(Kind.ENDED, "local rank 1 failed with exit code 1: ValueError: boom")] * 2
    last = launch.output.splitlines()[-1]
    assert last.startswith("launch: rank 1 failed with exit code 1: ValueError: boom; its log is logs/")
    assert "[rank1]: rank 1 says why" in launch.output
    assert "ChildFailedError" not in launch.output
    assert "failed (exitcode: 1)" in (tmp_path / "logs" / "torchrun.log").read_text()


def test_older_torchrun_waits_as_long_for_stopped_ranks(monkeypatch):
    """torchrun of torch 2.11 has no `--shutdown-timeout`."""
    older = argparse.ArgumentParser()
    older.add_argument("training_script")
    seconds = []
    monkeypatch.setattr(run, "get_args_parser", lambda: older)
    monkeypatch.setattr(PContext, "close", lambda context, death_sig=None, timeout=30: seconds.append(timeout))
    assert parse_arguments(["--shutdown-timeout", "600", "stub.py"]).training_script == "stub.py"
    PContext.close(None, signal.SIGTERM)
    PContext.close(None)
    assert seconds == [600, 30]


def test_missing_node_is_named_before_and_after_the_timeout(tmp_path):
    program = "import maskmoe.launch.meeting as meeting; meeting._LOOK_SECONDS = 0.5\n"
    program += "from maskmoe.launch.ranks import main; main()"
    words = f"--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id run -m stub".split()
    command = [sys.executable, "-c", program, "--rdzv-conf", "is_host=true,join_timeout=10", *words]
    with Launch(command, tmp_path, tmp_path / "run", {}) as launch:
        assert launch.wait() == 1
    # Before this node has registered, and after it has given up, no node is there.
    *lines, error = launch.output.splitlines()
    waiting = f"launch: waiting for 1 of 2 nodes at {words[5]}: each node needs the same --nodes, "
    assert any(line.startswith(waiting) for line in lines)
    assert error.startswith(f"error: the 2 nodes did not meet at {words[5]}, --rendezvous-id run: ")


def test_signal_is_the_cause_before_lost_peers():
    failures = {0: failure(1, timestamp=1), 1: failure(-signal.SIGSEGV, timestamp=2), 2: failure(-signal.SIGTERM)}
    assert find_cause(failures)[0] == 1
    assert find_cause({0: failure(1, timestamp=2), 3: failure(1, timestamp=1)})[0] == 3


@pytest.mark.parametrize(
    ("exit_code", "written", "expected"),
    [
        (
            1,
            "Traceback\n[rank1]: RuntimeError: lost\n\n",
            "rank 1 failed with exit code 1: RuntimeError: lost; its log",
        ),
        (1, "error: a full disk\n", "rank 1 failed with exit code 1: a full disk; its log"),
        (1, "", "rank 1 failed with exit code 1; its log"),
        (
            -signal.SIGABRT,
            "terminate called after\n",
            "rank 1 was ended by signal 6 (SIGABRT): terminate called after; ",
        ),
        (-signal.SIGKILL, "warning: uneven\n", "rank 1 was ended by signal 9 (SIGKILL); its log is "),
    ],
)
def test_description(tmp_path, exit_code, written, expected):
    folder = tmp_path / "id" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text(written)
    assert describe(1, 1, exit_code, str(tmp_path)).startswith(expected)
    assert describe(1, 1, exit_code, None) == expected.partition(";")[0].partition(": ")[0]
