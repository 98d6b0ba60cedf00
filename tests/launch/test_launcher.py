"""`maskmoe pretrain` and `evaluate`: how they start ranks, and the exit codes that they return."""

import signal
import sys
from collections.abc import Callable

import pytest
from support.launch import Launch
from support.paths import python_path

from maskmoe.command_line import pretrain
from maskmoe.command_line.pretrain import has_flags_only
from maskmoe.errors import UserError
from maskmoe.launch.launcher import split_processes
from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE

# An entry point that prints its ranks and arguments, and exits with the code in its first argument.
STUB = """
import os, sys, time
from maskmoe.processes.interruption import leave_exit_code
print("rank", os.environ.get("RANK"), "of", os.environ.get("WORLD_SIZE"), sys.argv[1:], flush=True)
if sys.argv[1] == "wait":
    time.sleep(1000)
code = int(sys.argv[1]) if sys.argv[1].isdecimal() else 0
if code > 1:
    leave_exit_code(code)
sys.exit(code)
"""
RUN = "from maskmoe.launch.launcher import run_entry_point; run_entry_point(('-m', 'stub'), {saves_checkpoints})"


@pytest.fixture
def run_stub(request, tmp_path) -> Callable[..., Launch]:
    """Run the stub by `run_entry_point`."""
    (tmp_path / "stub.py").write_text(STUB)

    def run_stub(*arguments: str, saves_checkpoints: bool = True, **environment: str) -> Launch:
        environment["PYTHONPATH"] = python_path(tmp_path)
        command = [sys.executable, "-c", RUN.format(saves_checkpoints=saves_checkpoints), *arguments]
        launch = Launch(command, tmp_path, tmp_path / "run", environment)
        request.addfinalizer(launch.kill)
        return launch

    return run_stub


def test_ranks_are_started_by_torchrun(run_stub):
    launch = run_stub("--nproc-per-node", "2", "0", "--lr", "1")
    assert launch.wait() == 0, launch.output
    lines = sorted(line for line in launch.output.splitlines() if line.startswith("rank"))
    assert lines == [f"rank {rank} of 2 ['0', '--lr', '1']" for rank in range(2)]


# tests/launch/test_node_run.py passes the remaining codes through the supervisor, without torchrun.
@pytest.mark.parametrize("code", [1, EXIT_HANG])
def test_exit_code_is_passed_through(run_stub, code):
    launch = run_stub(str(code))
    assert launch.wait() == code, launch.output
    assert "rank 0 of 1" in launch.output


@pytest.mark.parametrize(("saves_checkpoints", "code"), [(True, EXIT_REQUEUE), (False, 128 + signal.SIGTERM)])
def test_signal_stops_the_ranks(run_stub, saves_checkpoints, code):
    launch = run_stub("wait", saves_checkpoints=saves_checkpoints)
    launch.wait_for_output("rank 0 of 1")
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == code, launch.output
    assert ("stopped without saving a new checkpoint" in launch.output) == saves_checkpoints
    assert ("checkpoint" in launch.output) == saves_checkpoints


def test_rank_of_torchrun_runs_the_entry_point_itself(run_stub):
    launch = run_stub("3", RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
    assert launch.wait() == 3
    assert launch.output == "rank 5 of 8 ['3']\n"


def test_node_whose_scheduler_sets_its_rank_starts_ranks(run_stub):
    """Kubeflow's pods have RANK and WORLD_SIZE, whose values count nodes."""
    launch = run_stub("0", RANK="5", WORLD_SIZE="8")
    assert launch.wait() == 0, launch.output
    assert "rank 0 of 1 ['0']\n" in launch.output


@pytest.mark.parametrize("flag", ["--help", "-h", "--check", "--check=8"])
def test_help_and_check_need_no_ranks(run_stub, flag):
    launch = run_stub("--nproc-per-node=2", "0", flag)
    assert launch.wait() == 0
    assert launch.output == f"rank None of None ['0', '{flag}']\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--num-layers 2", True),
        ("--nproc-per-node 2 --lr 1", True),
        ("--check 8 --lr 1", True),
        ("--num-layers 2 --te-precision-config-file precision.yaml", True),
        ("--check model.yaml", False),
        ("--verbose model.yaml", False),
        ("--gpus-per-node=2 model.yaml", False),
        ("--nodes 2 models/model.yml --lr 1", False),
        ("model", False),
        ("", False),
    ],
)
def test_command_line_without_a_model_file_has_flags_only(line, expected):
    assert has_flags_only(line.split()) == expected


def test_options_of_the_launcher_need_a_model_file(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["maskmoe pretrain", "--run-dir=runs/x", "laptop", "--lr", "1"])
    with pytest.raises(UserError, match=r"^--run-dir needs a model file: write MODEL\.yaml"):
        pretrain.main()


def test_scheduler_may_set_the_rank_of_a_node(monkeypatch):
    """Kubeflow's pods have RANK and WORLD_SIZE, whose values count nodes."""
    launched = []
    monkeypatch.setattr(pretrain, "launch", lambda _, words: launched.append(words))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["--nodes", "2", "--node-rank", "1", "laptop.yaml", "--lr", "1"]
    monkeypatch.setattr(sys, "argv", ["maskmoe pretrain", *words])
    pretrain.main()
    assert launched == [words]


def test_number_of_processes_is_no_flag_of_training():
    rest = ["--lr", "-1", "-0.5,1", "a b", "--split=-1,2", "--nproc", "--", "--x"]
    assert split_processes(["--nproc-per-node", "8", *rest]) == (8, rest)
    assert split_processes([*rest[:-2], "--nproc-per-node=8"]) == (8, rest[:-2])
    assert split_processes([]) == (None, [])


@pytest.mark.parametrize("words", [["--nproc-per-node"], ["--nproc-per-node", "two"], ["--nproc-per-node=0"]])
def test_bad_number_of_processes_is_refused(words):
    with pytest.raises(UserError, match="--nproc-per-node"):
        split_processes(words)
