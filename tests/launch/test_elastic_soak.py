"""A run on three hosts, with a hundred faults of six kinds, logs the losses of an undisturbed run.

The environment variable SOAK_FAULTS sets the number of faults, SOAK_SEED their kinds and times. The test needs root and
the command `ip`, because its hosts have networks of their own.
"""

import itertools
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.network import Host, Network, running_network
from support.paths import ROOT
from support.runs import read_scalars
from support.training import SETTINGS, Workplace

from maskmoe.checkpoint.integrity import check_content
from maskmoe.checkpoint.series import checkpoint_path, finished_iterations
from maskmoe.errors import UserError
from maskmoe.processes.interruption import EXIT_HANG, EXIT_REQUEUE

FAULTS = int(os.environ.get("SOAK_FAULTS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
HOSTS = ("n1", "n2", "n3")
ITERATIONS = 200 + 15 * FAULTS
MODEL_ENDS = """
layouts:
  1: {}
  2: {expert-model-parallel-size: 2}
  3: {}
"""
# With a small learning rate, differences in the order of sums grow little. The loss of another batch differs by more.
FLAGS = f"""
    --train-iters {ITERATIONS} --save-interval 10 --keep-last-checkpoints 4 --eval-interval 1000000
    --global-batch-size 12 --lr 1e-5 --min-lr 1e-5
"""
TOLERANCE = 1e-3
CHECKPOINTS_MIB = 48
# In seconds.
NODE_TIMEOUT = 10
ABSENCE = 25.0
MOMENT = 12.0
PATIENCE = 300.0


class Soak:
    """A run on three hosts, and the faults that hit it.

    Args:
        network: The hosts.
        run_dir: Run folder.
        command: The launcher's command line on each host, without the host's own options.
        choice: Source of random numbers.
    """

    def __init__(self, network: Network, run_dir: Path, command: list[str], choice: random.Random) -> None:
        self._network = network
        self._run_dir = run_dir
        self._command = command
        self._choice = choice
        self._launchers: dict[str, subprocess.Popen[Any]] = {}
        self._due: dict[str, tuple[float, str]] = {}  # by host: when it is repaired, and what was done to it
        self._log = run_dir.with_suffix(".log")

    @property
    def output(self) -> str:
        """Everything that the launchers of all hosts have printed."""
        return self._log.read_text(errors="replace")

    @property
    def is_complete(self) -> bool:
        """Whether a launcher has ended well."""
        return any(launcher.poll() == 0 for launcher in self._launchers.values())

    def start(self, host: Host) -> None:
        """Start the launcher of a host."""
        with open(self._log, "a") as log:
            self._launchers[host.name] = host.popen(self._command, stdout=log, stderr=log)

    def tend(self) -> None:
        """Repair what is due, and start launchers that have ended, as Slurm does."""
        for name, host in self._network.hosts.items():
            due, kind = self._due.get(name, (0.0, ""))
            if kind and time.monotonic() > due:
                del self._due[name]
                if kind == "a node":
                    host.start()
                    self.start(host)
                else:
                    self._network.mend(name)
            launcher = self._launchers[name]
            if kind != "a node" and launcher.poll() not in (None, 0) and not self.is_complete:
                # SIGTERM ends a launcher that has not begun to listen to signals.
                codes = (1, EXIT_HANG, EXIT_REQUEUE, -signal.SIGTERM)
                assert launcher.returncode in codes, (launcher.returncode, self.output[-6000:])
                self.start(host)

    def wait_for_checkpoint(self) -> None:
        """Wait for the first checkpoint. Without one, another layout would start from other random weights."""
        begin = time.monotonic()
        while not finished_iterations(self._run_dir / "checkpoints"):
            assert time.monotonic() - begin < PATIENCE, self.output[-8000:]
            self._pass(0.5)

    def wait_for_a_moment(self) -> None:
        """Wait for some time, in which the ranks may start, train or save."""
        self._pass(self._choice.uniform(0, MOMENT))

    def strike(self, kind: str) -> bool:
        """Cause a fault; return whether it was possible."""
        hosts = [host for name, host in self._network.hosts.items() if name not in self._due]
        if not hosts:
            return False
        host = self._choice.choice(hosts)
        if kind in ("a node", "a link"):
            if kind == "a node":
                host.stop()
            else:
                self._network.cut(host.name)
            self._due[host.name] = (time.monotonic() + self._choice.uniform(0, ABSENCE), kind)
            return True
        if kind == "SIGTERM":
            self._terminate(host)
            return True
        if kind == "a full disk":
            self._fill_the_disk()
            return True
        return (kind == "a rank" or self._damage_a_checkpoint()) and self._kill_a_rank()

    def _pass(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.tend()
            time.sleep(0.1)

    def _kill_a_rank(self) -> bool:
        save = str(self._run_dir / "checkpoints")
        ranks = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            if save in (process.info["cmdline"] or ()) and "RANK" in (process.info["environ"] or {}):
                ranks.append(process)
        with suppress(psutil.NoSuchProcess):
            if ranks:
                self._choice.choice(ranks).kill()
        return bool(ranks)

    def _fill_the_disk(self) -> None:
        """Fill the disk of the checkpoints for some seconds, in which a save fails."""
        ballast = self._run_dir / "checkpoints" / "ballast"
        with suppress(OSError), open(ballast, "wb", buffering=0) as stream:
            while True:
                stream.write(bytes(1 << 16))
        self._pass(self._choice.uniform(0, ABSENCE))
        ballast.unlink()

    def _damage_a_checkpoint(self) -> bool:
        """Flip a bit of a file of the newest checkpoint, if an older sound one is left."""
        save = self._run_dir / "checkpoints"
        try:
            newest, older, *_ = (checkpoint_path(save, iteration) for iteration in finished_iterations(save))
            check_content(older)
            path = self._choice.choice(sorted(newest.glob("*.distcp")))
            content = bytearray(path.read_bytes())
            content[self._choice.randrange(len(content))] ^= 1
            path.write_bytes(content)
        except (OSError, UserError, ValueError, IndexError):
            return False
        return True

    def _terminate(self, host: Host) -> None:
        """Send SIGTERM to the launcher of a host."""
        entered = psutil.Process(self._launchers[host.name].pid)
        with suppress(psutil.NoSuchProcess):
            for process in [entered, *entered.children()]:
                if "pretrain" in process.cmdline():
                    process.send_signal(signal.SIGTERM)


@pytest.fixture
def model(tmp_path) -> Path:
    """Return a model file of the tiny model of `support.training`, with layouts for one to three ranks."""
    words = " ".join((SETTINGS + FLAGS).split())
    flags: dict[str, str] = {}
    for flag in words.split("--")[1:]:
        name, _, value = flag.strip().partition(" ")
        flags[name] = value or "true"
    path = tmp_path / "model.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in flags.items()) + MODEL_ENDS)
    return path


@pytest.fixture
def run_dir(tmp_path) -> Iterator[Path]:
    """Return a run folder whose checkpoints are on a small disk."""
    save = tmp_path / "soaked" / "checkpoints"
    save.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={CHECKPOINTS_MIB}m", "tmpfs", save], check=True)
    yield save.parent
    subprocess.run(["umount", "--lazy", save], check=True)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_random_faults(tmp_path, model, run_dir):
    workplace = Workplace(tmp_path)
    script = [str(ROOT / "launch" / "pretrain.sh")]
    paths = ["--data-path", workplace.folder / "data", "--routing-mask", workplace.folder / "mask.safetensors"]
    ends = [str(model), *map(str, paths)]
    undisturbed = tmp_path / "undisturbed"
    subprocess.run([*script, "--gpus-per-node", "3", "--run-dir", str(undisturbed), *ends], check=True, timeout=3600)
    expected = {event.step: event.value for event in read_scalars(undisturbed)["lm loss"]}

    choice = random.Random(SEED)
    options = ["--nodes", "1:3", "--gpus-per-node", "1", "--node-timeout", str(NODE_TIMEOUT), "--max-restarts", "2"]
    options += ["--shutdown-timeout", "20", "--rendezvous-timeout", "120", "--run-dir", str(run_dir)]
    hang = ["--hang-timeout", "30", "--distributed-timeout-minutes", "1"]
    kinds = ("a rank", "a node", "a link", "a full disk", "a damaged checkpoint", "SIGTERM")
    counts = dict.fromkeys(kinds, 0)
    with running_network(HOSTS, tmp_path) as network:
        soak = Soak(network, run_dir, [*script, *options, *ends, *hang], choice)
        for host in network.hosts.values():
            soak.start(host)
        soak.wait_for_checkpoint()
        while sum(counts.values()) < FAULTS:
            soak.wait_for_a_moment()
            assert not soak.is_complete, "the run ended before all faults: give it more iterations"
            kind = choice.choice(kinds)
            if soak.strike(kind):
                counts[kind] += 1
                print(f"fault {sum(counts.values())} of {FAULTS}: {kind}", flush=True)
        begin = time.monotonic()
        while not soak.is_complete:
            assert time.monotonic() - begin < 3600, soak.output[-8000:]
            soak.tend()
            time.sleep(0.5)
    logged = read_scalars(run_dir, keep_repeated=True)["lm loss"]
    assert {event.step for event in logged} == set(range(1, ITERATIONS + 1))
    worst = max(abs(event.value - expected[event.step]) for event in logged)
    values = [expected[step] for step in sorted(expected)]
    assert statistics.median(abs(a - b) for a, b in itertools.pairwise(values)) > 4 * TOLERANCE
    assert worst < TOLERANCE
    print(f"{counts}; worst {worst:.1e}")
