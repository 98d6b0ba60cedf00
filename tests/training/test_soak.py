"""A run that is killed SOAK_KILLS times, at times that SOAK_SEED draws, logs the values of an undisturbed run."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.runs import read_scalars
from support.training import Run, TrainingProcesses

from maskmoe.checkpoint.series import saved_iterations

KILLS = int(os.environ.get("SOAK_KILLS", "10"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
ITERATIONS = 20 * KILLS
FLAGS = f"""--expert-model-parallel-size 2 --train-iters {ITERATIONS} --save-interval 4 --eval-interval 50
    --keep-last-checkpoints 2 --hidden-dropout 0.1 --attention-dropout 0.1"""


def logged_values(folder: Path) -> list[tuple[tuple[str, int], float]]:
    """Return the name, iteration and value of every scalar that any process of a run logged."""
    logged = read_scalars(folder, keep_repeated=True)
    names = ("lm loss", "load_balancing_loss", "grad-norm")
    return [((name, event.step), event.value) for name in names for event in logged[name]]


def kill_at_random(processes: TrainingProcesses, choice: random.Random) -> None:
    """Kill a rank, both ranks or the launcher with its ranks, after a random time."""
    seconds = 8  # in which the processes start
    if choice.random() < 0.5:
        steps = processes.output.count("tokens/s")
        processes.wait_until(lambda: processes.output.count("tokens/s") > steps, "a step")
        seconds = 1  # in which the processes train, and save every fourth step
    time.sleep(choice.uniform(0, seconds))
    assert processes.is_running, processes.report()
    victims = choice.choice([(0,), (1,), (0, 1), None])
    if victims is None:
        processes.kill()
    for pid in filter(None, map(processes.pid_of_rank, victims or ())):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_random_kills(workplace, tmp_path):
    expected = dict(logged_values(workplace.run(Run(FLAGS, ranks=2), tmp_path / "undisturbed", timeout=900).folder))
    choice, kills, outcome = random.Random(SEED), 0, None
    flags = f"{FLAGS} --save {tmp_path}/save --load {tmp_path}/save --tensorboard-dir {tmp_path}/killed/tensorboard"
    while outcome is None:
        run = Run(f"{flags} {choice.choice(['', '--async-save'])}", ranks=2, torchrun=True, restarts=KILLS)
        with workplace.start(run, tmp_path / f"after{kills}") as processes:
            while kills < KILLS and processes.is_running:
                kill_at_random(processes, choice)
                kills += 1
            if processes.is_running:
                outcome = processes.wait(timeout=900)
    assert outcome.exit_codes == (0,), outcome.report()
    values = logged_values(tmp_path / "killed")
    assert dict(values).keys() == expected.keys()
    assert [each for each in values if each[1] != expected[each[0]]] == []
    assert saved_iterations(tmp_path / "save")[0] == ITERATIONS
