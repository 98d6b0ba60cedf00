"""A run whose processes are killed again and again logs the values of an undisturbed run.

The environment variable SOAK_KILLS sets the number of kills, SOAK_SEED their times.
"""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from support.runs import read_scalars
from support.training import Run

KILLS = int(os.environ.get("SOAK_KILLS", "100"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
ITERATIONS = 600
# In seconds. Half of the kills hit processes that start, the other half a run that trains and saves twice a second.
STARTING = 8.0
TRAINING = 3.0
FLAGS = f"""
    --expert-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval 4 --eval-interval 50
    --keep-last-checkpoints 2 --hidden-dropout 0.1 --attention-dropout 0.1
"""


def all_values(folder) -> list[tuple[str, int, float]]:
    """Return every scalar that any process of a run logged, as name, iteration and value."""
    logged = read_scalars(folder, keep_repeated=True)
    names = ("lm loss", "load_balancing_loss", "grad-norm")
    return [(name, event.step, event.value) for name in names for event in logged.get(name, ())]


def wait_for_a_moment(processes, choice: random.Random) -> None:
    """Wait for some time after the last kill, or after the first step since the last kill."""
    if choice.random() < 0.5:
        time.sleep(choice.uniform(0, STARTING))
        return
    steps = processes.output.count("elapsed time per iteration")
    while processes.is_running and processes.output.count("elapsed time per iteration") == steps:
        time.sleep(0.1)
    time.sleep(choice.uniform(0, TRAINING))


def kill_something(processes, choice: random.Random) -> str:
    """Kill a rank, both ranks, or both ranks of a node whose torchrun ends, too; return which."""
    ranks = [pid for pid in (processes.pid_of_rank(rank) for rank in (0, 1)) if pid is not None]
    kind = choice.choices(["a rank", "both ranks", "the node"], [0.7, 0.15, 0.15])[0]
    if kind == "a rank" and ranks:
        ranks = [choice.choice(ranks)]
    for pid in ranks:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return kind


def is_left_of(process: psutil.Process, save: Path) -> bool:
    """Report whether a process has a file of the run open: in, or beside, the folder of its checkpoints."""
    try:
        return any(file.path.startswith(str(save.parent)) for file in process.open_files())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_random_kills(workplace, tmp_path):
    undisturbed = workplace.run(Run(FLAGS, ranks=2), tmp_path / "undisturbed", timeout=900)
    assert undisturbed.exit_codes == (0, 0), undisturbed.report()
    expected = {(name, step): value for name, step, value in all_values(undisturbed.folder)}

    choice = random.Random(SEED)
    save = tmp_path / "save"
    kills, lives = 0, 0
    while True:
        # Start on a new node, saving synchronously or asynchronously at random.
        asynchronous = "--async-save" if choice.random() < 0.5 else ""
        run = Run(
            f"{FLAGS} {asynchronous} --save {save} --load {save} --tensorboard-dir {tmp_path}/killed/tensorboard",
            ranks=2,
            torchrun=True,
            restarts=10 * KILLS,
        )
        lives += 1
        with workplace.start(run, tmp_path / f"life{lives}") as processes:
            while kills < KILLS and processes.is_running:
                wait_for_a_moment(processes, choice)
                kills += 1
                if kill_something(processes, choice) == "the node":
                    break
            else:
                outcome = processes.wait(timeout=900)
                break
    assert kills == KILLS, "the run ended before all kills were done: give it more iterations"
    assert outcome.exit_codes == (0,), outcome.report()
    values = all_values(tmp_path / "killed")
    assert {step for _, step, _ in values} == set(range(1, ITERATIONS + 1))
    assert not [process for process in psutil.process_iter() if is_left_of(process, save)]
    differing = [(name, step) for name, step, value in values if value != expected[name, step]]
    assert not differing
    print(f"{KILLS} kills, {lives} nodes, {len(values) - len(expected)} values logged more than once, none different")
