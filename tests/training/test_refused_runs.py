"""A refused command changes no file and makes none, whichever rank refuses the run.

The run folder is complete: checkpoints of the iterations 7 and 12, event files, a page, logs and arguments. The test
compares names, sizes and times of all its files and folders.
"""

import shlex
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.command_lines import forget_megatrons_globals
from support.datasets import write_documents
from support.training import PRETRAIN, VOCAB_SIZE, Run

from maskmoe.errors import UserError
from maskmoe.processes.folder_lock import locked_folder
from maskmoe.training import trainer
from maskmoe.training.evaluation import evaluation

SECOND_RANK_LACKS_DATA = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # as on a node of its own
    sys.argv += ["--data-path", "nowhere"]
runpy.run_module("maskmoe.training.pretrain", run_name="__main__", alter_sys=True)
"""
UNUSABLE_IDS = "unusable"


@pytest.fixture
def run_folder(runs, tmp_path) -> Path:
    """Copy the checkpoints of the first run of the test, and add the other files of a run folder."""
    path = tmp_path / "run"
    shutil.copytree(runs[0].checkpoints, path / "checkpoints")
    for name in ("tensorboard/events.out.tfevents.1.host.1.0", "logs/rank0.log", "args.yaml", "report.html"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("of the run before")
    return path


def flags_of(path: Path) -> str:
    """Return the flags with which the run in a folder resumes."""
    folders = f"--save {path}/checkpoints --load {path}/checkpoints --tensorboard-dir {path}/tensorboard"
    return f"{folders} --hidden-dropout 0.1 --attention-dropout 0.1 --data-cache-path {path}/cache"


@pytest.fixture
def unusable_dataset(workplace) -> None:
    """Write a dataset with an id beyond the vocabulary, which only the first rank of each node finds."""
    documents = [np.where(np.arange(120) == 57, 599, 3)] * 10
    if not (workplace.folder / f"{UNUSABLE_IDS}.idx").exists():
        write_documents(workplace.folder / UNUSABLE_IDS, documents, np.int32)


Refuse = Callable[..., str]
PASSED = "all checks have passed"


@pytest.fixture
def read_traces(files_and_times) -> Callable[[Path], dict[str, object]]:
    """Read what a refused run could leave; the times of folders in which it makes a lock for a moment may change."""

    def read_traces(run_folder: Path) -> dict[str, object]:
        files = dict(files_and_times(run_folder))
        locked = [str(run_folder), str(run_folder / "checkpoints")]
        return files | {name: files[name][0] for name in locked}

    return read_traces


@pytest.fixture
def refuse(run_folder, workplace, monkeypatch, read_traces) -> Refuse:
    """Run an entry point in this process, check that it is refused without a trace, and return its error."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # and restore it after the test
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: (run_folder / "wandb of a refused run").touch()
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    def end_run(_: object) -> None:
        raise UserError(PASSED)

    monkeypatch.setattr(trainer, "meet_ranks", end_run)

    def refuse(flags: str, main: Callable[[], None] = trainer.main) -> str:
        if main is trainer.main:
            run = Run(f"{flags_of(run_folder)} {flags}", logs_scalars=False)
            words = workplace.flags(run, run_folder)
        else:
            words = shlex.split(
                f"{flags_of(run_folder)} --use-checkpoint-args --vocab-size {VOCAB_SIZE} --save-interval 7 {flags}"
            )
        monkeypatch.setattr(sys, "argv", ["maskmoe", *words])
        monkeypatch.chdir(workplace.folder)
        before = read_traces(run_folder)
        try:
            with pytest.raises(UserError) as refusal:
                main()
        finally:
            forget_megatrons_globals()
        assert read_traces(run_folder) == before
        return str(refusal.value)

    return refuse


REFUSED = {
    "--lr 1e-3 --wandb-project p": "was saved with another schedule",
    f"--data-path {UNUSABLE_IDS}": "token id 599 at position 57",
    "--num-attention-heads 3": "num_attention_heads",  # Megatron refuses the setting without a word
    "--use-checkpoint-args --add-qkv-bias": "--add-qkv-bias False in the checkpoint, True in this run",
    "": PASSED,
}


@pytest.mark.runs("fp32")
@pytest.mark.parametrize("flags", REFUSED)
def test_refused_training(refuse, unusable_dataset, flags):
    assert REFUSED[flags] in refuse(flags)


@pytest.mark.runs("fp32")
def test_missing_checkpoint_of_refused_training(refuse, run_folder):
    load = f"--load {run_folder}/nowhere"
    flag = "--exit-on-missing-checkpoint"
    assert refuse(f"{load} {flag}").startswith(f"{load} holds no checkpoint; leave {flag} out")
    assert refuse(load) == f"{load} holds no checkpoint; leave --load out to start from random weights"
    assert f"but {run_folder}/checkpoints does; leave" in refuse(f"--load {run_folder}")
    new = f"--load {run_folder}/new --save {run_folder}/new"
    for accepted in (
        flag,
        new,
        f"{load} {flag} --pretrained-checkpoint {run_folder}/checkpoints --save {run_folder}/new",
    ):
        assert refuse(accepted) == PASSED


@pytest.mark.runs("fp32")
def test_refused_evaluation(refuse, run_folder):
    output = f"--output {run_folder}/args.yaml"
    assert "args.yaml" in refuse(f"--data-path data --split 90,10,0 {output}", evaluation.main)


@pytest.mark.runs("fp32")
@pytest.mark.parametrize("tokenizer_type", ["", "SentencePieceTokenizer"])
@pytest.mark.parametrize("main", [evaluation.main, trainer.main])
def test_missing_tokenizer_beside_settings_of_the_checkpoint(refuse, main, tokenizer_type):
    """Megatron alone would take the tokenizer of the checkpoint without a word."""
    flags = "--use-checkpoint-args --tokenizer-model nowhere"
    flags += f" --tokenizer-type {tokenizer_type}" if tokenizer_type else ""
    assert "--tokenizer-model nowhere does not exist" in refuse(flags, main)


# ---- Real processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def refuse_ranks(run_folder, workplace, tmp_path, read_traces) -> Refuse:
    """Run two ranks, check that they are refused without a trace, and return their output.

    The second rank is the last, which has the writers.
    """

    def refuse_ranks(flags: str, ignored: tuple[str, ...] = (), program: tuple[str, ...] = PRETRAIN) -> str:
        run = Run(f"{flags_of(run_folder)} {flags}", ranks=2, logs_scalars=False, program=program)
        before = read_traces(run_folder)
        outcome = workplace.run(run, tmp_path / "output")
        assert 2 in outcome.exit_codes, outcome.report()
        assert 0 not in outcome.exit_codes, outcome.report()
        after = read_traces(run_folder)
        assert {path for path in {**before, **after} if before.get(path) != after.get(path)} <= set(ignored)
        return "".join(outcome.errors)

    return refuse_ranks


@pytest.mark.runs("fp32")
def test_dataset_that_the_first_rank_alone_refuses(refuse_ranks, unusable_dataset):
    assert "token id 599 at position 57" in refuse_ranks(f"--data-path {UNUSABLE_IDS}")


@pytest.mark.slow
@pytest.mark.runs("fp32")
def test_dataset_that_the_second_rank_alone_lacks(refuse_ranks, tmp_path):
    """The ranks are on different nodes."""
    (tmp_path / "program.py").write_text(SECOND_RANK_LACKS_DATA)
    assert "without nowhere, which does not exist on rank 1" in refuse_ranks(
        "", program=(str(tmp_path / "program.py"),)
    )


@pytest.mark.slow
@pytest.mark.runs("fp32")
def test_folder_of_a_run_that_trains(refuse_ranks, run_folder):
    with locked_folder(run_folder / "checkpoints"):
        assert "another process" in refuse_ranks("")


LOCKS_LATE = """
import pathlib, sys, time
from maskmoe.megatron_compat import prepare_process
prepare_process()
from maskmoe.processes import folder_lock
from maskmoe.processes.run_tool import run_tool
from maskmoe.training import trainer

folder = pathlib.Path(sys.argv.pop())

def acquire_late(*arguments, acquire=folder_lock._acquire):
    (folder / "about to lock").touch()
    while not (folder / "first has ended").exists():
        time.sleep(0.05)
    return acquire(*arguments)

folder_lock._acquire = acquire_late
if __name__ == "__main__":
    run_tool(trainer.main)
"""


def test_second_of_two_equal_commands_sees_what_the_first_has_saved(workplace, tmp_path):
    """The second starts before the first has saved, and locks the folder after the first has ended."""
    (tmp_path / "late.py").write_text(LOCKS_LATE)
    flags = f"--save {tmp_path}/save --load {tmp_path}/save --train-iters 2 --eval-iters 0 --lr-warmup-iters 1"
    late = Run(f"{flags} {tmp_path}", program=(str(tmp_path / "late.py"),), logs_scalars=False)
    with workplace.start(late, tmp_path / "second") as second:
        second.wait_until((tmp_path / "about to lock").exists)
        first = workplace.run(Run(flags), tmp_path / "first")
        assert (first.exit_codes, first.iterations) == ((0,), [1, 2])
        (tmp_path / "first has ended").touch()
        outcome = second.wait()
    assert outcome.exit_codes == (0,), outcome.report()
    assert "nothing is left to train" in outcome.output
    assert "iteration        1/" not in outcome.output
