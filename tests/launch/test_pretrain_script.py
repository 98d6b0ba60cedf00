"""`launch/pretrain.sh`: real runs of the laptop model, made smaller, and what they are when something interferes."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from support.runs import free_port, read_losses

from maskmoe.checkpoint.series import read_tracker
from maskmoe.data.indexed_dataset import IndexedDatasetWriter, optimal_dtype
from maskmoe.errors import UserError
from maskmoe.interruption import EXIT_HANG, EXIT_REQUEUE
from maskmoe.launch.command import run_flags, torchrun_command
from maskmoe.launch.model_file import split_flags
from maskmoe.launch.network import Route, route_to, wait_for
from maskmoe.launch.options import parse_options
from maskmoe.routing_mask.assignment import MaskRecipe
from maskmoe.routing_mask.mask import build_routing_mask

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "pretrain.sh"
LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"
VOCAB_SIZE = 510
ITERATIONS = 21
SMALLER = f"""
    --hidden-size 32 --num-attention-heads 2 --moe-ffn-hidden-size 32 --seq-length 32 --max-position-embeddings 32
    --train-iters {ITERATIONS} --lr-warmup-fraction false --lr-warmup-iters 3
    --save-interval 7 --eval-iters 1 --log-interval 1 --tensorboard-log-interval 1
    --data-path data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}
"""
MASK = "--routing-mask mask.safetensors"
EXPERT_2 = "--expert-model-parallel-size 2"
TIMEOUT = 240


class Launch:
    """A started command of a run; its process group is killed at the end of the `with` block.

    Args:
        command: to start.
        folder: to run in.
        run_dir: of the run.
        environment: further variables.
    """

    def __init__(self, command: list[str], folder: Path, run_dir: Path, environment: dict[str, str]):
        self.run_dir = run_dir
        self._log = folder / f"{run_dir.name}-{len(list(folder.glob('*.log')))}.log"
        variables = {"CUDA_VISIBLE_DEVICES": "", "PATH": os.environ["PATH"], "HOME": str(folder)}
        with open(self._log, "w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=variables | environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in children(self):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(TIMEOUT)

    def wait_for_iteration(self, iteration: int) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not re.search(rf"iteration +{iteration}/", self.output):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output[-4000:]
            time.sleep(0.02)

    def pid_of_rank(self, rank: int) -> int:
        for child in children(self):
            if child.environ().get("RANK") == str(rank):
                return child.pid
        raise AssertionError(f"there is no rank {rank}\n{self.output[-4000:]}")

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"


def children(launch: Launch) -> list[psutil.Process]:
    return psutil.Process(launch.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds a dataset and a routing mask."""
    folder = tmp_path_factory.mktemp("pretrain")
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, VOCAB_SIZE + 1)
    with IndexedDatasetWriter(folder / "data", optimal_dtype(VOCAB_SIZE)) as writer:
        for _ in range(30):
            writer.add_document(random.choice(VOCAB_SIZE, size=2 * random.integers(25, 100), p=shares / shares.sum()))
    recipe = MaskRecipe.from_preset("hash", 8, 4, seed=1)
    build_routing_mask(recipe, vocab_size=VOCAB_SIZE).save(folder / "mask.safetensors")
    return folder


@pytest.fixture(scope="module")
def start(folder):
    """Start `launch/pretrain.sh` on the smaller laptop model; to be used as a context manager."""

    def start(name: str, options: str = "", flags: str = MASK, processes: int = 2, **environment: str) -> Launch:
        options = [*("--gpus-per-node", str(processes), "--run-dir", f"runs/{name}"), *shlex.split(options)]
        command = [str(SCRIPT), *options, str(LAPTOP), *shlex.split(SMALLER), *shlex.split(flags)]
        if processes > 1:
            command += shlex.split(EXPERT_2)
        return Launch(command, folder, folder / "runs" / name, environment)

    return start


@pytest.fixture(scope="module")
def undisturbed(folder, start) -> dict[int, float]:
    """The losses of a run on two processes, started by the line that `--dry-run` prints."""
    with start("undisturbed", "--dry-run") as launch:
        assert launch.wait() == 0, launch.output
        assert not launch.run_dir.exists()
        (line,) = launch.output.splitlines()
    with Launch(["bash", "-c", line], folder, launch.run_dir, {}) as pasted:
        assert pasted.wait() == 0, pasted.output[-4000:]
    curve = read_losses(launch.run_dir)
    assert list(curve) == list(range(1, ITERATIONS + 1))
    return curve


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_signal_saves_and_the_run_goes_on(start, undisturbed, number):
    name = f"signalled-{number.name}"
    with start(name, "--no-check") as launch:
        launch.wait_for_iteration(9)
        os.killpg(launch.process.pid, number)
        assert launch.wait() == EXIT_REQUEUE, launch.output[-4000:]
    saved = read_tracker(launch.checkpoints)
    interrupted = read_losses(launch.run_dir)
    assert 9 <= saved < ITERATIONS and list(interrupted)[-1] == saved
    assert "attempt_1" not in "".join(map(str, launch.run_dir.rglob("*")))
    with start(name, "--no-check") as again:
        assert again.wait() == 0, again.output[-4000:]
    assert f"at iteration {saved}" in again.output
    assert read_losses(launch.run_dir) == undisturbed
    logs = sorted((launch.run_dir / "logs" / "node0").glob("*/attempt_0/*/stdout.log"))
    assert len(logs) == 4 and all(log.stat().st_size for log in logs)


@pytest.mark.slow
def test_signal_to_ranks_alone_does_not_restart_them(start):
    with start("ranks-signalled", "--no-check --max-restarts 5") as launch:
        launch.wait_for_iteration(9)
        os.kill(launch.pid_of_rank(1), signal.SIGUSR1)
        assert launch.wait() == EXIT_REQUEUE, launch.output[-4000:]
    assert "attempt_1" not in "".join(map(str, launch.run_dir.rglob("*")))


def test_signal_before_the_start(start):
    """The settings are still being checked, and there is nothing to save."""
    with start("early") as launch:
        deadline = time.monotonic() + TIMEOUT
        while not any("--check" in child.cmdline() for child in children(launch)) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(launch.process.pid, signal.SIGUSR1)
        assert launch.wait() == EXIT_REQUEUE, launch.output
    assert not launch.run_dir.exists()


@pytest.mark.slow
def test_two_nodes_are_one_job(start, undisturbed):
    """Both on this host; the signal to one of them stops both, and both go on."""

    def start_node(rank: int) -> Launch:
        options = f"--no-check --nodes 2 --node-rank {rank} --rendezvous 127.0.0.1:{port} --rendezvous-timeout 60"
        return start("nodes", options, flags=f"{MASK} {EXPERT_2}", processes=1)

    port = free_port()
    with start_node(1) as second, start_node(0) as first:
        second.wait_for_iteration(9)
        os.killpg(second.process.pid, signal.SIGTERM)
        codes = first.wait(), second.wait()
    assert codes == (EXIT_REQUEUE, EXIT_REQUEUE), first.output[-4000:] + second.output[-4000:]
    assert 9 <= read_tracker(first.checkpoints) < ITERATIONS
    port = free_port()
    with start_node(1) as second, start_node(0) as first:
        codes = first.wait(), second.wait()
    assert codes == (0, 0), first.output[-4000:] + second.output[-4000:]
    assert read_losses(first.run_dir) == undisturbed
    assert {path.name for path in (first.run_dir / "logs").iterdir()} == {"node0", "node1"}


@pytest.mark.slow
def test_killed_rank_is_restarted(start, undisturbed):
    with start("killed", "--no-check --max-restarts 1") as launch:
        launch.wait_for_iteration(9)
        os.kill(launch.pid_of_rank(1), signal.SIGKILL)
        assert launch.wait() == 0, launch.output[-4000:]
    assert "at iteration 7" in launch.output
    assert read_losses(launch.run_dir) == undisturbed


@pytest.mark.slow
def test_one_process_after_a_check(start, undisturbed):
    """The settings are checked, and found good; weights of another layout begin otherwise, and learn the same."""
    with start("one", processes=1) as launch:
        assert launch.wait() == 0, launch.output[-4000:]
    assert "no errors found" in launch.output
    curve = read_losses(launch.run_dir)
    assert list(curve) == list(undisturbed)
    assert curve[ITERATIONS] == pytest.approx(undisturbed[ITERATIONS], rel=0.05)


@pytest.mark.slow
def test_model_without_experts(start, folder):
    """It trains, is interrupted and goes on, and is evaluated, with neither a mask nor experts."""
    dense = """
        --num-experts false --moe-ffn-hidden-size false --moe-router-topk false --moe-router-pre-softmax false
        --moe-router-load-balancing-type false --moe-aux-loss-coeff false --ffn-hidden-size 64
    """
    with start("dense", flags=f"{dense} --exit-interval 7", processes=1) as launch:
        assert launch.wait() == 0, launch.output[-4000:]
    with start("dense", flags=dense, processes=1) as again:
        assert again.wait() == 0, again.output[-4000:]
    curve = read_losses(launch.run_dir)
    assert list(curve) == list(range(1, ITERATIONS + 1)) and curve[ITERATIONS] < curve[1] - 0.5
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "-m", "maskmoe.training.evaluate"]
    command += [
        "--load",
        str(launch.checkpoints),
        "--use-checkpoint-args",
        "--data-path",
        "data",
        "--split",
        "90,10,0",
        "--tokenizer-type",
    ]
    command += ["NullTokenizer", "--vocab-size", str(VOCAB_SIZE), "--eval-output", "dense.json"]
    with Launch(command, folder, folder / "dense", {}) as evaluation:
        assert evaluation.wait() == 0, evaluation.output[-4000:]
    assert (folder / "dense.json").exists()


def test_bad_flags_and_keys_are_refused_before_anything_starts(start, folder):
    with start("refused", flags=f"{MASK} --moe-router-topp 3") as launch:
        assert launch.wait() == 2
    (error,) = [line for line in launch.output.splitlines() if line.startswith("error: ")]
    assert "--moe-router-topp (nearest: --moe-router-topk)" in error
    assert not launch.run_dir.exists()


@pytest.mark.slow
def test_bad_input_that_ranks_find_is_not_tried_again(start):
    with start("unchecked", "--no-check", "--routing-mask nowhere.safetensors") as launch:
        assert launch.wait() == 2, launch.output[-4000:]
    assert len(re.findall(r"error: .*nowhere\.safetensors", launch.output)) == 1
    assert "attempt_1" not in "".join(map(str, launch.run_dir.rglob("*")))


# ---- Options and the command line ------------------------------------------------------------------------------------


def command_line(arguments: str, environment: dict[str, str] | None = None, route: Route | None = None, processes=8):
    options = parse_options(shlex.split(arguments), environment or {})
    return torchrun_command(options, run_flags(options, {}, split_flags(options.flags)), processes, route, {})


def test_one_node_meets_at_itself():
    line = str(command_line("--run-dir /run model.yaml"))
    assert "--nnodes 1 --nproc-per-node 8 --standalone --local-addr 127.0.0.1 --max-restarts 3" in line
    assert line.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 ")
    assert "SOCKET_IFNAME" not in line


def test_many_nodes_by_flags_or_environment_are_the_same():
    by_flags = (
        "--nodes 4 --node-rank 2 --rendezvous head:1234 --rendezvous-id job --max-restarts 1 --run-dir /run m.yaml"
    )
    by_environment = {
        "NNODES": "4",
        "NODE_RANK": "2",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "1234",
        "RDZV_ID": "job",
        "MAX_RESTARTS": "1",
        "RUN_DIR": "/run",
    }
    route = Route("10.0.0.3", "eth1")
    line = str(command_line(by_flags, route=route))
    assert line == str(command_line("m.yaml", by_environment, route))
    assert line == str(command_line(by_flags, by_environment | {"NNODES": "9", "RDZV_ENDPOINT": "other:1"}, route))
    assert "GLOO_SOCKET_IFNAME=eth1 NCCL_SOCKET_IFNAME=eth1 " in line
    assert (
        "--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:1234 --rdzv-id job "
        "--rdzv-conf is_host=false,join_timeout=600 --local-addr 10.0.0.3 --max-restarts 1 "
    ) in line
    assert "--log-dir /run/logs/node2 " in line
    assert "is_host=true" in str(command_line(by_flags.replace("--node-rank 2", "--node-rank 0")))


def test_variables_of_the_user_are_kept():
    options = parse_options(["m.yaml"], {})
    command = torchrun_command(
        options, {}, 1, None, {"OMP_NUM_THREADS": "7", "CUDA_DEVICE_MAX_CONNECTIONS": "32", "PYTHONUNBUFFERED": "1"}
    )
    assert command.environment == {}


def test_folders_of_the_run():
    assert "--save /run/checkpoints --load /run/checkpoints --tensorboard-dir /run/tensorboard" in str(
        command_line("--run-dir /run m.yaml")
    )
    moved = str(command_line("--run-dir /run m.yaml --save /elsewhere --tensorboard-dir false"))
    assert moved.endswith(" --load /elsewhere --save /elsewhere")
    assert parse_options(["launch/models/laptop.yaml"], {}).run_dir == ROOT / "runs" / "laptop"


@pytest.mark.parametrize(
    "arguments, environment, reason",
    [
        ("", {}, "MODEL.yaml"),
        ("--nodes 0 m.yaml", {}, "--nodes: '0' is no whole number from 1 .*"),
        ("m.yaml", {"NNODES": "two"}, "--nodes.*'two' is no whole number from 1"),
        ("--nodes 2 m.yaml", {}, "2 nodes need a place to meet"),
        ("--nodes 2 --rendezvous a m.yaml", {}, "2 nodes need a number each"),
        ("--nodes 2 --rendezvous a --node-rank 2 m.yaml", {}, "--node-rank 2: the ranks of 2 nodes end at 1"),
        ("--rendezvous a:b m.yaml", {}, "'a:b' is no HOST:PORT"),
        ("--nonsense m.yaml", {}, "--nonsense"),
    ],
)
def test_bad_options_are_refused(arguments, environment, reason):
    with pytest.raises(UserError, match=reason):
        parse_options(shlex.split(arguments), environment)


def test_words_after_the_model_file_are_flags():
    with pytest.raises(UserError, match=r"after the model file come Megatron's flags, not 'more\.yaml'"):
        split_flags(("more.yaml",))


def test_route_is_unknown_for_this_machine_and_for_names_without_meaning():
    assert route_to("localhost", 1) is None
    assert route_to("no-such-host.invalid", 1) is None


def test_unreachable_rendezvous_is_named():
    with pytest.raises(UserError, match=r"node 0 cannot be reached at 127\.0\.0\.1:1 after 0.1 s"):
        wait_for("127.0.0.1", 1, 0.1)


# ---- The supervisor, with other commands than torchrun ---------------------------------------------------------------

SUPERVISE = """
import sys
from maskmoe.launch import supervisor
from maskmoe.launch.command import Command
program, shutdown_timeout, supervisor._UNNOTICED = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
supervisor._INSPECTION = supervisor._UNNOTICED / 4
sys.exit(supervisor.Supervisor(shutdown_timeout).run(Command((sys.executable, "-c", program), {})))
"""
LEAVE = "from maskmoe.interruption import leave_exit_code; leave_exit_code({code})"


@pytest.fixture
def supervise(tmp_path) -> Iterator:
    """Start a supervisor over a Python program."""
    started = []

    def supervise(program: str, shutdown_timeout: float = 20, patience: float = 60) -> Launch:
        command = [sys.executable, "-c", SUPERVISE, program, str(shutdown_timeout), str(patience)]
        started.append(Launch(command, tmp_path, tmp_path / "run", {}))
        return started[-1]

    yield supervise
    for launch in started:
        launch.__exit__()


@pytest.mark.parametrize("code", [0, 1, 3])
def test_exit_code_is_that_of_the_command(supervise, code):
    assert supervise(f"import sys; sys.exit({code})").wait() == code


@pytest.mark.parametrize("code", [2, EXIT_REQUEUE, EXIT_HANG])
def test_exit_code_that_a_rank_left_ends_the_run(supervise, code):
    launch = supervise(f"{LEAVE.format(code=code)}; import time; time.sleep(1000)")
    assert launch.wait() == code


@pytest.mark.parametrize("has_signal", [False, True])
def test_command_that_takes_no_notice_is_killed(supervise, has_signal):
    """As torchrun does where its store does not answer: ranks have ended, and a signal is not looked at."""
    launch = supervise(
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        # Kept, since an object that goes away reaps its process.
        f"rank = subprocess.Popen(['true']); {LEAVE.format(code=EXIT_HANG)}\n"
        "print('ready', flush=True); time.sleep(1000)",
        shutdown_timeout=2,
        patience=2,
    )
    wait_for_output(launch, "ready")
    if has_signal:
        launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == EXIT_HANG
    assert "torchrun takes no notice" in launch.output


def test_complete_run_is_complete_though_signalled(supervise):
    launch = supervise(
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(0)); print('ready', flush=True)\n"
        "time.sleep(1000)"
    )
    wait_for_output(launch, "ready")
    launch.process.send_signal(signal.SIGUSR1)
    assert launch.wait() == 0


def test_signal_without_a_checkpoint_asks_for_a_restart(supervise):
    launch = supervise("print('ready', flush=True); import time; time.sleep(1000)")
    wait_for_output(launch, "ready")
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() == EXIT_REQUEUE
    assert "ended without a new checkpoint" in launch.output


def test_ranks_that_outlive_torchrun_are_ended(supervise, tmp_path):
    """The command is killed and leaves a process in a session of its own, which needs a moment to end."""
    rank = (
        "import pathlib, signal, time\n"
        f"def save(*_): time.sleep(1); pathlib.Path('{tmp_path}/saved').touch(); exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('ready', flush=True); time.sleep(1000)"
    )
    command = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    launch = supervise(command)
    wait_for_output(launch, "ready")
    (child,) = psutil.Process(launch.process.pid).children()
    child.kill()
    assert launch.wait() == 128 + signal.SIGKILL
    assert (tmp_path / "saved").exists()


def test_killed_supervisor_takes_the_run_along(supervise):
    launch = supervise("print('ready', flush=True); import time; time.sleep(1000)")
    wait_for_output(launch, "ready")
    (child,) = psutil.Process(launch.process.pid).children()
    launch.process.kill()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running()


def wait_for_output(launch: Launch, text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in launch.output:
        assert launch.process.poll() is None and time.monotonic() < deadline, launch.output
        time.sleep(0.02)
