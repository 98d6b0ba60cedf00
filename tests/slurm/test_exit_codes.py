"""The job script launch/slurm/pretrain.sbatch after the exit codes of the nodes, with stubs of Slurm's commands."""

import os
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.system import write_script

from maskmoe.processes.interruption import EXIT_REQUEUE

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
BAD_INPUT = 2

# `$CODES` holds the exit code of each node. A node without a code is killed before it can write one. With `$STOPS`,
# srun forwards a signal that stops the job.
STUBS = {
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || log=${1#--output=}; shift; done
        [[ $1 != true ]] || exit 0
        trap : USR1
        [[ -z $STOPS ]] || kill -USR1 $PPID
        worst=0 node=0
        for code in $CODES; do
            if [[ $code == none ]]; then result=137; else
                result=0
                CODE=$code SLURM_NODEID=$node "$@" >"${log/\\%N/n$node}" || result=$?
            fi
            ((result <= worst)) || worst=$result
            ((node += 1))
        done
        exit $worst
    """,
    "scontrol": """
        case "$*" in
            "show hostnames"*) printf '%s\\n' n0 n1 ;;
            *"show node"*) echo "NodeName=n0 NodeAddr=10.0.0.1 x" ;;
            *"show job"*) echo "JobId=1 JobState=${STATE:-RUNNING} x" ;;
            requeue*) echo "$*" ;;
        esac
    """,
    "launch/pretrain.sh": 'echo "error: code $CODE on node $NODE_RANK"; exit $CODE',
}


@pytest.fixture
def train(tmp_path: Path):
    """Run the script on two nodes that exit with the given codes; return its exit code and its output."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "model.yaml").touch()
    for name, program in STUBS.items():
        write_script(tmp_path / name, f"#!/usr/bin/env bash\n{program}\n")

    def train(
        codes: str, *flags: str, options: tuple[object, ...] = (), stops: bool = False, **variables: str
    ) -> tuple[int, str]:
        stubs = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODES": codes, "STOPS": "yes" if stops else ""}
        job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
        environment = {**os.environ, **stubs, **job, **variables}
        folders = ("--root", tmp_path, "--run-dir", tmp_path / "run")
        command = [SCRIPT, *folders, "--no-node-check", *options, tmp_path / "model.yaml", *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        result = subprocess.run(command, env=environment, **pipes, timeout=60, check=False)
        return result.returncode, result.stdout

    return train


WORDS = {
    1: ("the run failed with exit code 1", "error: code 1 on node"),
    BAD_INPUT: ("the run failed with exit code 2", "error: code 2 on node"),
    EXIT_REQUEUE: ("a signal stopped the run; the job is requeued", "requeue 1"),
}
"""Words of the output, for each exit code of the job."""


@pytest.mark.parametrize(
    ("expected", "codes"),
    [
        (1, f"1 {EXIT_REQUEUE}"),
        (1, f"{EXIT_REQUEUE} 1"),
        (1, "1 none"),
        (1, "0 1"),
        (BAD_INPUT, f"{BAD_INPUT} {EXIT_REQUEUE}"),
        (BAD_INPUT, f"1 {BAD_INPUT}"),
        (EXIT_REQUEUE, f"{EXIT_REQUEUE} {EXIT_REQUEUE}"),
        (EXIT_REQUEUE, f"0 {EXIT_REQUEUE}"),
        (EXIT_REQUEUE, f"stop 1 {EXIT_REQUEUE}"),
        (EXIT_REQUEUE, f"stop {EXIT_REQUEUE} none"),
        (EXIT_REQUEUE, "stop none none"),
    ],
)
def test_exit_code(train, expected, codes):
    """After a failure or bad input on one node, Slurm stops the other node; `stop` is a signal to the job."""
    code, output = train(codes.removeprefix("stop "), stops=codes.startswith("stop"))
    assert code == expected
    assert all(words in output for words in WORDS[expected])


def test_job_of_an_array_is_requeued_alone(train):
    """The id of an array's last job is the id of the array, too."""
    _, output = train(f"{EXIT_REQUEUE} 0", SLURM_ARRAY_JOB_ID="1", SLURM_ARRAY_TASK_ID="3")
    assert "requeue 1_3\n" in output


def test_time_limit_that_leaves_no_time_for_training(train):
    """Slurm gives notice at once, so a requeued job would not train either."""
    limit = {"SLURM_JOB_START_TIME": "1000", "SLURM_JOB_END_TIME": "1240"}
    code, output = train(f"{EXIT_REQUEUE} {EXIT_REQUEUE}", stops=True, **limit)
    assert code == BAD_INPUT
    assert "give a longer --time, or less notice" in output
    assert "requeue 1" not in output


def test_flags_reach_the_nodes(train, tmp_path):
    """A shell would replace an unquoted `*` by the names of files, and divide the prompt at the space."""
    (tmp_path / "launch" / "pretrain.sh").write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"${0%/*}/given"\n')
    flags = ["--hybrid-layer-pattern", "*", "--prompt", "a b"]
    train("0 0", *flags)
    assert (tmp_path / "launch" / "given").read_text().splitlines()[-4:] == flags


def test_signal_to_the_script_of_a_node_reaches_the_launcher(train, tmp_path):
    """With proctrack/cgroup, Slurm sends signals to a step's first process alone."""
    (tmp_path / "srun").write_text(f"""#!/usr/bin/env bash
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 "$@" &
        until [[ -e {tmp_path}/ready ]]; do sleep 0.1; done
        kill -USR1 $!
        wait $!
    """)
    (tmp_path / "launch" / "pretrain.sh").write_text(f"""#!/usr/bin/env bash
        trap "sleep 0.3; exit {EXIT_REQUEUE}" USR1
        touch {tmp_path}/ready
        for ((i = 0; i < 100; i++)); do sleep 0.1; done
    """)
    code, output = train("")
    assert code == EXIT_REQUEUE
    assert "a signal stopped the run; the job is requeued" in output


def test_job_that_slurm_is_ending_is_left_to_slurm(train):
    """Scancel and preemption end the job; Slurm alone knows which of them."""
    code, output = train(f"{EXIT_REQUEUE} {EXIT_REQUEUE}", STATE="COMPLETING")
    assert code == EXIT_REQUEUE
    assert "requeue 1" not in output


@pytest.mark.parametrize(("task", "expected"), [("1", 0), ("2", EXIT_REQUEUE)])
def test_last_job_of_a_chain_asks_for_another_start(train, task, expected):
    array = {"SLURM_ARRAY_JOB_ID": "1", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": "2"}
    code, output = train(f"{EXIT_REQUEUE} {EXIT_REQUEUE}", options=("--chain",), **array)
    assert code == expected
    assert "requeue 1" not in output
