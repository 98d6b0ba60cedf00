"""Resuming from the newest sound checkpoint, and removing old checkpoints."""

import re
import shutil
import traceback
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.training import checkpointing, training
from support.command_lines import run_command
from support.training import Run
from torch.distributed import HashStore
from torch.distributed.checkpoint.api import CheckpointException

from maskmoe.checkpoint import saver
from maskmoe.checkpoint.integrity import Manifest, check_content, check_structure
from maskmoe.checkpoint.reading import CheckpointError, read_checkpoint_layout
from maskmoe.checkpoint.series import (
    RELEASE,
    TRACKER,
    Choice,
    checkpoint_path,
    choose_checkpoint,
    iteration_of,
    read_tracker,
    saved_iterations,
    temporary_load_folder,
    write_tracker,
)
from maskmoe.errors import RunFailure, UserError
from maskmoe.training.ranks import Ranks
from maskmoe.training.resume import find_checkpoint as resume
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load, find_checkpoint
from maskmoe.training.watch.early_ends import report_early_end

SAVED = "expert parallel 2, undisturbed"  # at 7, 14 and 21
EXPERT_2 = "--expert-model-parallel-size 2"


def check_all(checkpoint: Path) -> None:
    check_structure(checkpoint)
    check_content(checkpoint)


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """Copy the checkpoints of the test's first run."""
    return shutil.copytree(runs[0].checkpoints, tmp_path / "copy")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "tensors truncated": (lambda folder: truncate(folder / "__1_0.distcp"), r"__1_0\.distcp has \d+ of \d+ bytes"),
    "tensors removed": (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "layout truncated": (lambda folder: truncate(folder / ".metadata"), r"\.metadata has \d+ of \d+ bytes"),
    "layout removed": (lambda folder: (folder / ".metadata").unlink(), r"\.metadata is missing"),
    "manifest truncated": (lambda folder: truncate(folder / "integrity.json"), r"integrity\.json is damaged"),
    "settings removed": (lambda folder: (folder / "metadata.json").unlink(), "was not finished"),
    "all removed": (shutil.rmtree, "does not exist"),
}


@pytest.mark.runs(SAVED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_passed_over(copy, damage):
    do, reason = DAMAGES[damage]
    do(checkpoint_path(copy, 21))
    choice = choose_checkpoint(copy, check=check_all)
    assert choice.iteration == 14
    (rejected,) = choice.rejected
    assert rejected.checkpoint == checkpoint_path(copy, 21)
    assert re.search(reason, rejected.fault)


@pytest.mark.runs(SAVED)
@given(data=st.data())
def test_any_flipped_bit_is_found(copy, data):
    checkpoint = checkpoint_path(copy, 14)
    path = checkpoint / data.draw(st.sampled_from(sorted(path.name for path in checkpoint.iterdir() if path.is_file())))
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    try:
        check_all(checkpoint)
        manifest = Manifest.load(checkpoint)
    except CheckpointError:
        pass
    else:
        # Both files have parts that no check reads, such as names and formats.
        assert path.name in ("integrity.json", "metadata.json")
        assert manifest != Manifest(files={})
    finally:
        path.write_bytes(content)


def loaded_by_megatron(chosen: Path | None, folder: Path) -> int | None:
    """Return the iteration of the checkpoint that Megatron loads from a folder; None if it loads none."""
    args = Namespace(load=str(folder), non_persistent_ckpt_type=None, non_persistent_global_ckpt_dir=None)
    args.ckpt_step = None if chosen is None else iteration_of(chosen)
    args.exit_on_missing_checkpoint = args.no_save_optim = args.no_save_rng = False
    before = Namespace(**vars(args))
    with temporary_load_folder(chosen, args):
        state, *_ = checkpointing._load_base_checkpoint(args.load, args, rank0=True)
    assert args == before
    return state and state["iteration"]


@pytest.mark.runs(SAVED)
@pytest.mark.parametrize("content", ["", "twenty", None])
def test_unusable_tracker(copy, content, files_and_times):
    if content is None:
        (copy / TRACKER).unlink()
    else:
        (copy / TRACKER).write_text(content)
    before = files_and_times(copy)
    args, ranks = Namespace(load=str(copy), ckpt_step=None, verify_checkpoint=True), Ranks(HashStore(), 0, 1)
    assert find_checkpoint(args.load, args, ranks) == checkpoint_path(copy, 21)
    assert loaded_by_megatron(checkpoint_path(copy, 21), copy) == 21
    assert files_and_times(copy) == before


@pytest.mark.runs(SAVED)
def test_iteration_beside_an_imported_model_is_loaded(copy):
    """Megatron loads the imported model, whatever --ckpt-step says, if the tracker names it."""
    checkpoint_path(copy, 14).rename(copy / RELEASE)
    write_tracker(copy, RELEASE)
    args, ranks = Namespace(load=str(copy), ckpt_step=7, verify_checkpoint=True), Ranks(HashStore(), 0, 1)
    assert find_checkpoint(args.load, args, ranks) == checkpoint_path(copy, 7)
    assert loaded_by_megatron(checkpoint_path(copy, 7), copy) == 7
    assert loaded_by_megatron(copy / RELEASE, copy) == 14


@pytest.mark.runs(SAVED)
def test_megatron_loads_the_chosen_checkpoint_only(copy):
    """Megatron takes a pretrained checkpoint if there is no other."""
    assert loaded_by_megatron(checkpoint_path(copy, 14), copy) == 14
    assert loaded_by_megatron(None, copy) is None


@pytest.mark.slow
@pytest.mark.runs(SAVED)
def test_imported_model_is_trained_with_a_retain_interval(copy, workplace, tmp_path):
    checkpoint_path(copy, 21).rename(copy / RELEASE)
    for iteration in (7, 14):
        shutil.rmtree(checkpoint_path(copy, iteration))
    write_tracker(copy, RELEASE)
    flags = f"--load {copy} --save {copy} --save-interval 2 --save-retain-interval 4 --exit-interval 6 --eval-iters 0"
    outcome = workplace.run(Run(flags), tmp_path / "run")
    assert outcome.exit_codes == (0,), outcome.report()
    assert outcome.iterations == [1, 2, 3, 4, 5, 6]
    assert saved_iterations(copy) == [6, 4]
    assert read_tracker(copy) == 6


@pytest.mark.runs(SAVED)
def test_run_resumes_from_the_newest_intact_checkpoint(runs, copy, workplace, tmp_path):
    """All ranks share the work of verifying, and agree on the checkpoint."""
    (undisturbed,) = runs
    flip(checkpoint_path(copy, 21) / "__0_0.distcp")
    flip(checkpoint_path(copy, 14) / "__1_0.distcp")
    run = Run(f"{EXPERT_2} --load {copy} --save {copy}", ranks=2)
    outcome = workplace.run(run, tmp_path / "run")
    assert outcome.exit_codes == (0, 0), outcome.report()
    for line in (
        f"warning: checkpoint {copy}/iter_0000021 __0_0.distcp does not have the content that was saved",
        f"warning: checkpoint {copy}/iter_0000014 __1_0.distcp does not have the content that was saved",
        f"warning: resuming from {copy}/iter_0000007",
    ):
        assert sum(error.splitlines().count(line) for error in outcome.errors) == 1
    assert outcome.iterations == list(range(8, 22))
    assert outcome.difference(undisturbed) == 0
    for iteration in (7, 14, 21):
        check_all(checkpoint_path(copy, iteration))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("passed", "saved"), [("3 7 8", [4, 8]), ("4", [8])], ids=["the last iterations", "an iteration between"]
)
def test_the_last_iteration_is_saved_once(workplace, tmp_path, passed, saved):
    """Megatron saves no iteration that it passes over."""
    flags = f"--train-iters 8 --save-interval 4 --iterations-to-skip {passed}"
    outcome = workplace.run(Run(flags, saves=True), tmp_path / "run")
    assert outcome.exit_codes == (0,), outcome.report()
    assert outcome.iterations == [step for step in range(1, 9) if str(step) not in passed]
    assert outcome.saved == saved
    assert read_tracker(outcome.checkpoints) == 8
    check_all(checkpoint_path(outcome.checkpoints, 8))


@pytest.mark.slow
def test_checkpoint_stays_if_the_next_step_gives_nan(workplace, tmp_path):
    """The gradient of the iteration after the save is NaN, also when Megatron repeats the step."""
    fault = {"FAULT": "nan-always", "FAULT_RANK": "0", "FAULT_ITERATION": "5", "FAULT_FOLDER": str(tmp_path)}
    program = (str(Path(__file__).parents[1] / "pretrain_with_fault.py"),)
    run = Run("--async-save --save-interval 4 --eval-iters 0", saves=True, program=program)
    with workplace.start(run, tmp_path / "run", environment=fault, are_preloaded=True) as processes:
        outcome = processes.wait()
    assert outcome.exit_codes == (16,), outcome.report()
    assert outcome.errors[0].rstrip().endswith("The newest checkpoint is of iteration 4")
    assert outcome.output.count("checkpoint of iteration 4 saved") == 1
    check_all(checkpoint_path(outcome.checkpoints, 4))


def test_an_iteration_is_saved_once(tmp_path, monkeypatch):
    settings = Namespace(save=str(tmp_path), load=None, async_save=False, keep_last_checkpoints=1)
    settings.save_retain_interval, save_checkpoint = None, Mock()
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr(training, "save_checkpoint", save_checkpoint)

    def saves(**changes: object) -> int:
        """Return how often another run saves iteration 4, of which it is asked for two times."""
        vars(settings).update(changes)
        save_checkpoint.reset_mock()
        own = saver.CheckpointSaver(settings)
        own.save(4)
        own.save(4)
        return save_checkpoint.call_count

    assert saves() == 1
    monkeypatch.setattr(saver, "get_loaded_iteration", lambda: 4)
    assert saves(load=str(tmp_path), finetune=False) == 0
    assert saves(load=str(tmp_path / "elsewhere")) == 1


@pytest.mark.slow
@pytest.mark.runs(SAVED)
@pytest.mark.parametrize("algorithm", ["broadcast", "gather_rounds"])
def test_ranks_share_the_work_of_loading(runs, copy, workplace, tmp_path, algorithm):
    """The ranks send each other also the routing mask, whose integers of 16 bits no collective could send."""
    shutil.rmtree(checkpoint_path(copy, 21))
    (copy / TRACKER).write_text("14")
    flags = f"{EXPERT_2} --load {copy} --ckpt-fully-parallel-load --ckpt-fully-parallel-load-exchange-algo {algorithm}"
    outcome = workplace.run(Run(flags, ranks=2), tmp_path / "run")
    assert outcome.exit_codes == (0, 0), outcome.report()
    assert outcome.iterations == list(range(15, 22))
    assert outcome.difference(runs[0]) == 0


@pytest.mark.parametrize("flags", ["", pytest.param("--async-save", marks=pytest.mark.slow)])
def test_old_checkpoints_are_removed_but_those_to_retain(workplace, tmp_path, flags):
    flags += " --save-interval 2 --keep-last-checkpoints 2 --save-retain-interval 4 --exit-interval 11"
    outcome = workplace.run(Run(flags, saves=True), tmp_path / "run")
    assert outcome.exit_codes == (0,), outcome.report()
    assert saved_iterations(outcome.checkpoints) == [11, 10, 8, 4]


@pytest.mark.slow
@pytest.mark.runs(SAVED)
@pytest.mark.parametrize(
    ("damages", "flags", "resumed", "saved"),
    [
        (True, "--keep-last-checkpoints 1", 15, [21, 16]),
        (False, "--ckpt-step 7 --keep-last-checkpoints 2", 8, [21, 14, 9, 8]),
    ],
    ids=["damaged", "gone back"],
)
def test_newer_checkpoints_do_not_outlive_the_checkpoints_of_a_resumed_run(
    copy, workplace, tmp_path, damages, flags, resumed, saved
):
    """Checkpoints beyond the one that was loaded do not count as the newest checkpoints of the run."""
    if damages:
        flip(checkpoint_path(copy, 21) / "__0_0.distcp")
    flags = f"{EXPERT_2} --load {copy} --save {copy} --save-interval 1 --exit-interval {resumed + 1} {flags}"
    outcome = workplace.run(Run(flags, ranks=2), tmp_path / "run")
    assert outcome.exit_codes == (0, 0), outcome.report()
    assert outcome.iterations == [resumed, resumed + 1]
    assert saved_iterations(copy) == saved
    assert choose_checkpoint(copy, check=check_all).iteration == resumed + 1


@pytest.mark.runs(SAVED)
def test_pruning_counts_from_the_checkpoint_that_would_be_loaded(copy):
    (copy / TRACKER).write_text("14")
    for flags, output in (
        (("--save-retain-interval", "7"), ""),
        (("--dry-run",), f"would remove  {copy}/iter_0000007\n"),
        ((), f"removed  {copy}/iter_0000007\n"),
    ):
        result = run_command("prune", "--load", copy, *flags)
        assert (result.code, result.output) == (0, output), result.errors
    assert saved_iterations(copy) == [21, 14]


@pytest.mark.runs(SAVED)
def test_run_begins_with_the_newest_intact_pretrained_checkpoint(copy, parse, tmp_path, capsys):
    flags = f"--pretrained-checkpoint {copy} --save {tmp_path}/save --load {tmp_path}/save"
    flip(checkpoint_path(copy, 21) / "__0_0.distcp")
    args = parse(flags)
    assert checkpoint_to_load(args) == checkpoint_path(copy, 14)
    assert args.finetune
    assert "warning: checkpoint" in capsys.readouterr().err
    shutil.rmtree(copy)
    with pytest.raises(UserError, match=f"^--pretrained-checkpoint {copy} holds no checkpoint"):
        parse(flags)


@pytest.mark.slow
@pytest.mark.runs(SAVED)
def test_pretrained_checkpoint_is_named_and_only_read_at_the_first_start(copy, workplace, tmp_path):
    flags = f"{EXPERT_2} --pretrained-checkpoint {copy} --save {tmp_path}/save --load {tmp_path}/save --eval-iters 0"
    for iteration, start in ((1, f"from the weights of {copy}/iter_0000021"), (2, "resumes from .*/iter_0000001")):
        run = Run(f"{flags} --exit-interval {iteration}", ranks=2, mask=None)
        outcome = workplace.run(run, tmp_path / str(iteration))
        assert outcome.exit_codes == (0, 0), outcome.report()
        assert outcome.iterations == [iteration]
        assert re.search(rf"^start +{start}$", (outcome.folder / "out0.log").read_text(), re.MULTILINE)


@pytest.mark.runs(SAVED)
def test_failed_load_is_not_a_failed_save(copy, monkeypatch):
    """Megatron raises the same exception for both."""
    monkeypatch.setattr("multiprocessing.active_children", list)  # which would be ended
    error = CheckpointException("failed", {0: (OSError("Input/output error"), traceback.extract_stack())})
    args = Namespace(load=str(copy), ckpt_step=21, pretrained_checkpoint=None)
    with (
        pytest.raises(RunFailure, match=rf"^cannot load {copy}/iter_0000021: Input/output error; remove the cause"),
        report_early_end(args),
    ):
        raise error


@pytest.mark.runs(SAVED)
def test_checkpoints_that_a_run_does_not_continue_stay(runs, tmp_path, parse):
    """The checkpoints of the folder may be of another run, with other settings."""
    save, other = runs[0].checkpoints, tmp_path / "other"
    shutil.copytree(save, other)
    for flags, folder in (
        (f"--seed 77 --save {save}", save),
        (f"--pretrained-checkpoint {save} --save {save}", save),
        (f"--finetune --load {save} --save {save}", save),
        (f"--load {save} --save {other}", other),
    ):
        with pytest.raises(UserError, match=f"^{folder} holds a checkpoint of iteration 21 already, and this run"):
            parse(flags)
    # A run that loads from elsewhere may have been started again.
    parse(f"--load {save} --save {tmp_path / 'new'}")
    parse(f"--load {save} --save {save}/../save")


@pytest.mark.runs(SAVED)
def test_converted_model_is_not_finetuned_in_its_own_folder(runs, tmp_path, parse):
    """The run could not start again: with --finetune, it would write over its own checkpoints."""
    shutil.copytree(checkpoint_path(runs[0].checkpoints, 21), tmp_path / RELEASE)
    write_tracker(tmp_path, RELEASE)
    same = f"--load {tmp_path} --save {tmp_path}"
    with pytest.raises(UserError, match=f"^{tmp_path} holds a checkpoint already, and this run would start at iter"):
        parse(f"--finetune {same}")
    parse(same)


@pytest.mark.runs(SAVED)
def test_damaged_arguments_are_an_error_of_one_line(runs, copy, parse):
    """The sizes of the files are right, and only the checkpoint that a run loads is verified."""
    checkpoint = checkpoint_path(copy, 21)
    places = read_checkpoint_layout(checkpoint).storage_data
    (place,) = (place for index, place in places.items() if index.fqn.startswith("common_state/"))
    with open(checkpoint / place.relative_path, "r+b") as stream:
        stream.seek(place.offset)
        stream.write(bytes(place.length))
    damage = f"^{checkpoint} holds no arguments of the run, or they are damaged"
    with pytest.raises(UserError, match=f"{damage} or not just data: save to another folder$"):
        parse(f"--load {runs[0].checkpoints} --save {copy}")
    with pytest.raises(UserError, match=damage):
        parse(f"--load {copy} --no-verify-checkpoint")


def test_run_that_loads_from_elsewhere_may_start_again(tmp_path, monkeypatch):
    load, save = tmp_path / "load", tmp_path / "save"
    checkpoint_path(save, 8).mkdir(parents=True)
    (checkpoint_path(save, 8) / "metadata.json").touch()
    saved = Namespace(load=f"{load}/")
    monkeypatch.setattr(resume, "choose_checkpoint", lambda _: Choice(checkpoint_path(save, 8)))
    monkeypatch.setattr(resume, "read_common_state", lambda _: {"args": saved})
    args = Namespace(load=str(load), save=str(save), finetune=False)
    resume.check_save_folder_is_own(args, checkpoint_path(load, 4))
    for other in (Namespace(load=str(tmp_path)), Namespace(load=str(load), finetune=True)):
        saved = other
        with pytest.raises(UserError, match="and this run would continue the run in --load"):
            resume.check_save_folder_is_own(args, checkpoint_path(load, 4))


@pytest.mark.parametrize("changes", [{}, {"load": None}, {"finetune": True}])
def test_run_that_was_killed_in_its_first_save_may_start_again(tmp_path, changes):
    saved = checkpoint_path(tmp_path, 8)
    saved.mkdir()
    same = {"save": str(tmp_path), "load": str(tmp_path), "finetune": False, "ckpt_step": None}
    args = Namespace(**same | {"verify_checkpoint": True} | changes)
    assert find_checkpoint(str(tmp_path), args, Ranks(HashStore(), 0, 1)) is None
    resume.check_save_folder_is_own(args, None)
    (saved / "metadata.json").touch()
    with pytest.raises(UserError, match=f"^{tmp_path} holds a checkpoint of iteration 8 already"):
        resume.check_save_folder_is_own(args, None)
