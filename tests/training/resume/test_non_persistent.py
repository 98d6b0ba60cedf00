"""Non-persistent checkpoints: verified, chosen and kept like the others, but only the newest of them."""

import os
import re
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import pytest
from support.training import Run, TrainingOutcome, Workplace

from maskmoe.checkpoint.integrity import check_content, check_structure
from maskmoe.checkpoint.series import (
    TRACKER,
    check_separate_folder,
    checkpoint_path,
    make_room,
    non_persistent_folder,
    saved_iterations,
)
from maskmoe.errors import UserError

PROGRAM = (str(Path(__file__).parents[1] / "pretrain_with_fault.py"),)
FLAGS = "--non-persistent-ckpt-type global --non-persistent-save-interval 3"
EXPERT_2 = "--expert-model-parallel-size 2"
REFERENCE = "reference"  # one process, 21 iterations


def local(save: Path) -> Path:
    return save / "non_persistent"


def resume(workplace: Workplace, folder: Path, save: Path, flags: str = FLAGS, **settings) -> TrainingOutcome:
    run = Run(f"{flags} --load {save} --save {save}", **settings)
    outcome = workplace.run(run, folder)
    assert not any(outcome.exit_codes), outcome.report()
    return outcome


@pytest.fixture(scope="module")
def killed(workplace, tmp_path_factory) -> Path:
    """Kill a run after it has saved a non-persistent checkpoint of iteration 12, and return its checkpoints.

    There are a persistent checkpoint of iteration 7 and a non-persistent one of iteration 12.
    """
    folder = tmp_path_factory.mktemp("killed")
    save = folder / "save"
    run = Run(f"{FLAGS} --load {save}", saves=True, program=PROGRAM)
    # The run stands still before iteration 14, after which it would save a persistent checkpoint.
    fault = {"FAULT": "hang", "FAULT_RANK": "0", "FAULT_ITERATION": "14", "FAULT_FOLDER": str(folder)}
    with workplace.start(run, folder / "run", environment=fault) as processes:
        save.symlink_to(folder / "run" / "save")
        processes.wait_for_iteration(13)
        os.kill(processes.pids[0], signal.SIGKILL)
        processes.wait()
    return save.resolve()


@pytest.fixture
def copy(killed, tmp_path) -> Path:
    return shutil.copytree(killed, tmp_path / "save")


@pytest.mark.runs(REFERENCE)
def test_killed_run_resumes_from_the_non_persistent_checkpoint(runs, workplace, copy, tmp_path):
    (reference,) = runs
    assert saved_iterations(copy) == [7]
    assert saved_iterations(local(copy)) == [12]
    resumed = resume(workplace, tmp_path / "run", copy)
    assert f"resumes from {local(copy)}/iter_0000012" in resumed.output
    assert resumed.iterations == list(range(13, 22))
    assert resumed.difference(reference) == 0
    assert saved_iterations(copy) == [21, 14, 7]
    assert saved_iterations(local(copy)) == [18]
    check_structure(checkpoint_path(local(copy), 18))
    check_content(checkpoint_path(local(copy), 18))


def test_last_iteration_that_only_a_non_persistent_checkpoint_holds_is_saved(workplace, copy, tmp_path):
    """The run was killed before the save after its last iteration."""
    flags = f"{FLAGS} --train-iters 12 --override-opt-param-scheduler"
    for name in ("first", "second"):
        complete = resume(workplace, tmp_path / name, copy, flags, logs_scalars=False)
        assert "nothing is left to train" in complete.output
        assert saved_iterations(copy) == [12, 7]
    check_structure(checkpoint_path(copy, 12))
    assert "saved checkpoint" not in complete.output


@pytest.mark.slow
@pytest.mark.runs(REFERENCE)
def test_non_persistent_checkpoint_loads_in_another_layout(runs, workplace, copy, tmp_path):
    """The settings and the mask are those of the checkpoint."""
    (reference,) = runs
    flags = f"{FLAGS} {EXPERT_2} --exit-interval 15 --use-checkpoint-args"
    resumed = resume(workplace, tmp_path / "run", copy, flags, ranks=2, mask=None)
    assert resumed.iterations == [13, 14, 15]
    assert 0 < resumed.difference(reference) < 1e-4


@pytest.mark.slow
@pytest.mark.runs(REFERENCE)
def test_non_persistent_checkpoint_precedes_a_pretrained_model(runs, workplace, killed, copy, tmp_path):
    """The run was killed before its first persistent checkpoint."""
    (reference,) = runs
    shutil.rmtree(checkpoint_path(copy, 7))
    (copy / TRACKER).unlink()
    flags = f"{FLAGS} --pretrained-checkpoint {killed} --exit-interval 14 --save-interval 100"
    resumed = resume(workplace, tmp_path / "run", copy, flags)
    assert resumed.iterations == [13, 14]
    assert resumed.difference(reference) == 0


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--async-save"])
@pytest.mark.runs(REFERENCE)
def test_killed_while_saving_a_non_persistent_checkpoint(runs, workplace, tmp_path, flags):
    """The older sound one stays, also while the unfinished one is written again and the run is killed again."""
    (reference,) = runs
    save, flags = tmp_path / "save", f"{FLAGS} {flags} --save-interval 100"
    unfinished = checkpoint_path(local(save), 6) / "__0_0.distcp"
    environment = {"FAULT": "slow-save", "FAULT_RANK": "0", "FAULT_ITERATION": "0", "FAULT_FOLDER": str(tmp_path)}
    resume(workplace, tmp_path / "start", save, f"{flags} --exit-interval 3")
    assert saved_iterations(save) == []
    for name in ("first", "second"):
        run = Run(f"{flags} --save {save} --load {save}", program=PROGRAM)
        with workplace.start(run, tmp_path / name, environment=environment) as processes:
            processes.wait_for_iteration(5)
            unfinished.unlink(missing_ok=True)
            processes.wait_until(unfinished.exists)
            os.kill(processes.pids[0], signal.SIGKILL)
            processes.wait()
        assert saved_iterations(local(save)) == [6, 3]
        check_structure(checkpoint_path(local(save), 3))
    resumed = resume(workplace, tmp_path / "resumed", save, flags)
    assert f"{local(save)}/iter_0000006 was not finished" in resumed.output
    assert resumed.iterations == list(range(4, 22))
    assert resumed.difference(reference) == 0
    assert saved_iterations(local(save)) == [21]
    assert saved_iterations(save) == [21]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--async-save"])
def test_only_the_newest_is_kept_and_every_save_is_logged(workplace, tmp_path, flags):
    """Neither kind counts for the other. Checkpoints of `--save-retain-interval` stay."""
    folder = tmp_path / "fast"
    flags += (
        f" --non-persistent-ckpt-type global --non-persistent-save-interval 2 --non-persistent-global-ckpt-dir {folder}"
    )
    flags += " --keep-last-checkpoints 2 --save-retain-interval 3 --save-interval 3"
    outcome = workplace.run(Run(f"{flags} --train-iters 16", saves=True), tmp_path / "run")
    assert outcome.exit_codes == (0,), outcome.report()
    assert saved_iterations(outcome.checkpoints) == [16, 15, 12, 9, 6, 3]
    assert saved_iterations(folder) == [16]
    assert not local(outcome.checkpoints).exists()
    log = (outcome.checkpoints / "logs" / "rank0.log").read_text()
    assert outcome.saved == [3, 6, 9, 12, 15, 16]
    assert re.findall(r"^non-persistent checkpoint of iteration (\d+) saved", log, re.MULTILINE) == [
        "2",
        "4",
        "8",
        "10",
        "14",
        "16",
    ]


@pytest.mark.parametrize(
    ("name", "flag"), [("save", "--save"), (".", "--save"), ("other", "--load"), ("link", "--save")]
)
def test_folder_with_other_checkpoints_is_refused(tmp_path, name, flag):
    """Megatron would remove the persistent checkpoints as old non-persistent ones."""
    (tmp_path / "save").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "save")
    args = Namespace(save=f"{tmp_path}/save", load=f"{tmp_path}/other/run/checkpoints")
    args.non_persistent_global_ckpt_dir = str(tmp_path / name)
    with pytest.raises(UserError, match=rf"holds the folder of {flag} .*pass a folder of its own"):
        check_separate_folder(args)


def test_folder_beside_or_inside_the_checkpoints_is_accepted(tmp_path):
    args = Namespace(save=f"{tmp_path}/save", load=f"{tmp_path}/save", non_persistent_ckpt_type="global")
    for folder in ("save/fast", "fast", None):
        args.non_persistent_global_ckpt_dir = folder and str(tmp_path / folder)
        check_separate_folder(args)
        assert non_persistent_folder(args, args.save) == tmp_path / (folder or "save/non_persistent")


@pytest.mark.slow
def test_room_is_made_for_a_save(copy, tmp_path):
    """A checkpoint that was rejected, or left behind by a run that went back, must not count as the newest one."""
    folder = local(copy)
    for iteration in (3, 6, 9, 15):
        shutil.copytree(checkpoint_path(folder, 12), checkpoint_path(folder, iteration))
    (checkpoint_path(folder, 9) / "metadata.json").unlink()
    make_room(folder, 15)
    assert saved_iterations(folder) == [12]
    shutil.copytree(checkpoint_path(folder, 12), checkpoint_path(folder, 7))
    make_room(folder, 15, loaded=7)
    assert saved_iterations(folder) == [7]
