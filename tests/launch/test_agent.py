"""torchrun with our rules: which ends are final, on one node and on two, and which exit code the launcher has."""

import os
import signal
import sys
import time
from collections.abc import Callable

import psutil
import pytest
from support.launchers import Launch
from support.paths import python_path
from support.runs import free_port
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from maskmoe.launch.agent import describe_failure
from maskmoe.launch.torchrun_command import ENTRY_POINT_ENVIRONMENT
from maskmoe.processes.interruption import EXIT_REQUEUE

# A rank that runs the statements in its first argument. `wait` ends after SIGTERM with the code for a saved checkpoint.
RANK = """
import os, pathlib, signal, sys, time
rank, folder = int(os.environ["RANK"]), pathlib.Path(sys.argv[2])
def wait():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("waits", rank, flush=True)
    time.sleep(1000)
(folder / f"start-{rank}-{time.time()}").touch()
exec(sys.argv[1])
"""

Start = Callable[..., Launch]


@pytest.fixture
def start(request, tmp_path) -> Start:
    """Start one node's torchrun on a rank that runs some statements."""
    (tmp_path / "stub.py").write_text(RANK)

    def start(statements: str, *options: str, name: str = "run") -> Launch:
        environment = ENTRY_POINT_ENVIRONMENT | {"PYTHONPATH": python_path(tmp_path)}
        words = ["--monitor-interval", "0.1", *(options or ("--standalone", "--nproc-per-node", "2"))]
        command = [sys.executable, "-m", "maskmoe.launch.agent", *words, "-m", "stub", statements, str(tmp_path)]
        launch = Launch(command, tmp_path, tmp_path / name, environment)
        request.addfinalizer(launch.kill)
        return launch

    return start


def num_starts(folder, rank: int) -> int:
    return len(list(folder.glob(f"start-{rank}-*")))


@pytest.mark.parametrize(
    ("statements", "code", "starts"),
    [
        ("pass", 0, 1),
        ("sys.exit(2) if rank else time.sleep(1000)", 2, 1),
        ("sys.exit(75) if rank else time.sleep(1000)", EXIT_REQUEUE, 1),
        ("sys.exit(3) if rank else time.sleep(1000)", 1, 2),
    ],
    ids=["complete", "bad input", "stopped", "failure"],
)
def test_only_failures_are_restarted(start, tmp_path, statements, code, starts):
    launch = start(statements, "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    assert launch.wait() == code, launch.output
    assert num_starts(tmp_path, 1) == starts
    assert ("rank 1 failed with exit code 3" in launch.output) == (code == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_lets_the_ranks_save(start, number):
    signals = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    launch = start("wait()", "--standalone", "--nproc-per-node", "2", *signals)
    launch.wait_for_output("waits 0")
    launch.wait_for_output("waits 1")
    os.killpg(launch.process.pid, number)
    os.killpg(launch.process.pid, signal.SIGTERM)  # a second signal does not disturb the ranks
    assert launch.wait() == EXIT_REQUEUE, launch.output


def test_second_interrupt_kills(start):
    launch = start("signal.signal(signal.SIGTERM, signal.SIG_IGN); print('waits', rank, flush=True); time.sleep(1000)")
    launch.wait_for_output("waits 0")
    launch.wait_for_output("waits 1")
    launch.process.send_signal(signal.SIGINT)
    launch.wait_for_output("stops")
    launch.process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    assert launch.wait() == EXIT_REQUEUE
    assert time.monotonic() - begin < 20


def two_nodes(start: Start, statements: str, nodes: str = "2") -> list[Launch]:
    port = free_port()

    def node(number: int) -> Launch:
        options = ("--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job")
        is_host = str(not number).lower()
        options += ("--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", f"is_host={is_host},last_call_timeout=3")
        return start(statements, *options, "--max-restarts", "3", name=f"node{number}")

    return [node(0), node(1)]


def test_refusal_on_one_node_ends_the_other_node(start, tmp_path):
    """One rank refuses before it has process groups, and another rank waits for it in a call without signals."""
    begin = time.monotonic()
    launches = two_nodes(start, "sys.exit(2) if rank else time.sleep(1000)")
    codes = {launch.wait() for launch in launches}
    assert time.monotonic() - begin < 60
    assert codes == {1, 2}, [launch.output for launch in launches]
    assert num_starts(tmp_path, 0) == 1
    assert "another node has ended the run" in "".join(launch.output for launch in launches)


def test_signal_to_one_node_stops_both_nodes(start):
    """As Megatron's ranks, the ranks of both nodes end after a signal to one of them."""
    wait = "signal.signal(signal.SIGTERM, lambda *_: (folder / 'stop').touch()); print('waits', rank, flush=True)\n"
    wait += "while not (folder / 'stop').exists(): time.sleep(0.1)\nsys.exit(75)"
    launches = two_nodes(start, wait)
    for launch in launches:
        launch.wait_for_output("waits")
    launches[1].process.send_signal(signal.SIGTERM)
    assert [launch.wait() for launch in launches] == [EXIT_REQUEUE] * 2, [launch.output for launch in launches]


def test_node_that_does_not_find_node_0_says_where_it_looked(start):
    endpoint = f"127.0.0.1:{free_port()}"
    conf = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-conf", "is_host=false,read_timeout=2")
    launch = start("pass", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "job", *conf)
    assert launch.wait() == 1
    assert f"the 2 nodes did not meet at {endpoint}, --rendezvous-id job: " in launch.output


def test_ranks_end_with_a_killed_launcher(start):
    statements = (
        "from maskmoe.processes.interruption import end_with_parent\nend_with_parent(os.getppid(), signal.SIGTERM)\n"
    )
    launch = start(statements + "wait()", "--standalone", "--nproc-per-node", "1")
    launch.wait_for_output("waits 0")
    ranks = psutil.Process(launch.process.pid).children()
    launch.process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive


def test_report_names_the_rank_that_failed_first(tmp_path):
    def failure(local_rank: int, code: int, seconds: int) -> ProcessFailure:
        failure = ProcessFailure(local_rank, 1, code, str(tmp_path / "none"))
        object.__setattr__(failure, "timestamp", seconds)
        return failure

    folder = tmp_path / "run" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    (folder / "stderr.log").touch()
    failures = {4: failure(0, 1, 5), 5: failure(1, -signal.SIGKILL, 6), 6: failure(2, -signal.SIGTERM, 1)}
    expected = f"rank 5 was ended by signal 9 (SIGKILL); its log is {folder / 'stderr.log'}"
    assert describe_failure(failures, str(tmp_path)) == expected
