"""A run whose settings differ from the checkpoint's says so, and does what it says.

The checkpoint is from iteration 7 of a run of 21 iterations with 8 samples each, and a cosine schedule from 2e-3 to
2e-4 with 3 iterations of warm-up.
"""

import math
import shutil
import sys
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
from megatron.training.arguments import parse_args, validate_args
from support.command_lines import forget_megatrons_globals
from support.runs import read_scalars
from support.training import Run, TrainingOutcome
from support.training_runs import IN_ITERATIONS

from maskmoe.checkpoint.series import checkpoint_path
from maskmoe.errors import UserError
from maskmoe.training import trainer
from maskmoe.training.resume import changed_settings
from maskmoe.training.resume.changed_settings import ChangedSettings, find_changed_settings
from maskmoe.training.settings.agreement import digest_of_datasets
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments

OVERRIDE = "--override-opt-param-scheduler"
# Changes that Megatron refuses on every rank, or would ignore, and parts of the one line that a run ends with.
ERRORS = {
    "--train-iters 30": ["another schedule", "number of iterations", OVERRIDE, "--finetune"],
    "--lr 1e-3": ["another schedule", "learning rate", OVERRIDE],
    "--weight-decay 0.5": ["another schedule", "weight decay"],
    "--global-batch-size 12 --train-iters 14 --lr-warmup-iters 2": ["8 in the checkpoint, 12 in this run", OVERRIDE],
    "--optimizer sgd": ["--optimizer adam in the checkpoint, sgd in this run", "--no-load-optim"],
    "--use-distributed-optimizer": ["--use-distributed-optimizer False in the checkpoint, True", "--no-load-optim"],
    "--decoupled-lr 1e-4": ["another optimizer: --decoupled-lr None in the checkpoint, 0.0001 in this run"],
    "--adam-beta2 0.95": ["--adam-beta2 0.999 in the checkpoint, 0.95 in this run", "--no-load-optim"],
}
# Changes that take effect although nobody asked for them, and parts of the notes.
NOTES = {
    "--no-load-optim --lr 1e-3": ["a new optimizer continues at iteration 7", "at every start: remove the flag"],
    "--seed 7": ["another order (--seed 1234 in the checkpoint, 7 in this run)", "at sample 56 of the new order"],
    "--dataloader-type cyclic --micro-batch-size 4": ["--dataloader-type single", "--micro-batch-size 2 in the"],
    "--data-path ended": ["another order (the digest of the datasets"],
    f"--train-iters 99 {OVERRIDE}": ["reads 792 samples, not 168", "another order"],
    f"--train-iters 22 {OVERRIDE}": ["reads 176 samples, not 168"],
    f"--global-batch-size 16 --train-iters 10 {OVERRIDE}": ["reads 160 samples, not 168"],
    "--moe-router-topk 3": ["trained with other settings: --moe-router-topk 2 in the checkpoint, 3 in this run"],
    "--skip-train --lr 1 --rotary-base 500000": ["other settings: --rotary-base 10000 in the checkpoint, 500000 in"],
    f"--train-iters 7 {OVERRIDE}": ["has reached --train-iters 7: nothing is left to train"],
    f"--train-iters 5 {OVERRIDE}": ["has reached --train-iters 5: nothing is left to train"],
}
# Changes that need no word.
QUIET = (
    "",
    f"--lr 1e-3 {OVERRIDE}",
    "--finetune --lr 1",
    "--eval-iters 3 --eval-interval 2",
    "--hidden-dropout 0",
    "--moe-aux-loss-coeff 0.1",
    "--data-path ./data",
    "--num-layers 4 --log-interval 5",
    "--skip-train --lr 1 --seed 7",
)


@pytest.fixture
def changed(runs, workplace, monkeypatch):
    """Find the changes of a run with further flags; the first run of the test saved the checkpoint."""
    checkpoint = checkpoint_path(runs[0].checkpoints, 7)

    def changed(
        flags: str, omits: str | None = None, ranks: int = 1, folder: Path = workplace.folder
    ) -> ChangedSettings:
        run = Run(f"--hidden-dropout 0.1 --attention-dropout 0.1 --distributed-backend gloo {flags}", omits=omits)
        words = workplace.flags(run, workplace.folder / "unused", runs[0].checkpoints)
        monkeypatch.setattr(sys, "argv", ["pretrain", *words])
        monkeypatch.chdir(folder)
        args = parse_args(lambda parser: add_pretraining_arguments(add_maskmoe_arguments(parser)))
        args.rank, args.world_size, args.padded_vocab_size = 0, ranks, 512  # as with a tokenizer
        args.datasets_digest = digest_of_datasets(args)
        validate_args(args)
        return find_changed_settings(args, checkpoint)

    yield changed
    unset_num_microbatches_calculator()


@pytest.mark.runs("fp32")
@pytest.mark.parametrize("flags", ERRORS)
def test_change_that_would_fail_or_be_ignored_is_an_error(changed, flags):
    (error,) = changed(flags).errors
    for part in (*ERRORS[flags], "docs/extending.md"):
        assert part in error
    assert "\n" not in error


@pytest.mark.runs("fp32")
def test_schedule_that_no_run_can_have_is_refused(changed):
    with pytest.raises(UserError, match="Megatron refuses the schedule"):
        changed("--lr-warmup-iters 30")


@pytest.mark.runs("fp32")
@pytest.mark.parametrize("flags", NOTES)
def test_change_that_takes_effect_is_noted(changed, flags):
    found = changed(flags)
    assert found.errors == ()
    for part in NOTES[flags]:
        assert part in " ".join(found.notes)
    assert found.is_complete == ("nothing is left" in " ".join(found.notes))


@pytest.mark.runs("fp32")
@pytest.mark.parametrize("flags", QUIET)
def test_other_changes_need_no_word(changed, flags):
    assert changed(flags) == ChangedSettings()


@pytest.mark.runs("fp32")
def test_dataset_that_was_exchanged_at_its_path_is_noted(changed, workplace, tmp_path):
    for suffix in (".idx", ".bin"):
        shutil.copy(workplace.folder / f"data{suffix}", tmp_path)
    assert changed("", folder=tmp_path) == ChangedSettings()
    with open(tmp_path / "data.bin", "r+b") as stream:
        first = stream.read(1)
        stream.seek(0)
        stream.write(bytes([first[0] ^ 1]))
    (note,) = changed("", folder=tmp_path).notes
    assert "in another order (the digest of the datasets" in note


SAMPLES = "--lr-warmup-samples 24 --train-samples"
SCHEDULE = "--step-batch-size-schedule"


@pytest.mark.runs("fp32")
def test_equal_length_in_samples_needs_no_word(changed):
    assert changed(f"{SAMPLES} 168", IN_ITERATIONS) == ChangedSettings()


@pytest.mark.runs("fp32")
@pytest.mark.parametrize(
    ("flags", "errors", "notes", "is_complete"),
    [
        (f"{SAMPLES} 240", ("another schedule",), (), False),
        (f"{SAMPLES} 56 {OVERRIDE}", (), ("has reached --train-samples 56",), True),
        (
            f"{SAMPLES} 168 --global-batch-size 16",
            ("has read 56 samples in 7 iterations, which are 3 iterations", "--step-batch-size-schedule"),
            (),
            False,
        ),
        (f"{SAMPLES} 168 {SCHEDULE} '0:8 1792:16'", (), (), False),  # the batches grow after the checkpoint
        (f"{SAMPLES} 168 {SCHEDULE} '0:4 1792:16'", ("which are 14 iterations",), (), False),
    ],
)
def test_changed_length_in_samples(changed, flags, errors, notes, is_complete):
    found = changed(flags, f"{IN_ITERATIONS} --global-batch-size" if SCHEDULE in flags else IN_ITERATIONS)
    assert len(found.errors) == bool(errors)
    for part in errors:
        assert part in found.errors[0]
    for part in notes:
        assert part in " ".join(found.notes)
    assert found.is_complete == is_complete


@pytest.mark.runs("fp32")
def test_changed_settings_of_muon_and_lion_are_refused(changed, runs, monkeypatch):
    state = load_common_state_dict(checkpoint_path(runs[0].checkpoints, 7))
    vars(state["args"]).update(optimizer="muon", use_layer_wise_distributed_optimizer=True)
    monkeypatch.setattr(changed_settings, "read_common_state", lambda checkpoint: state)
    (error,) = changed("--optimizer muon --muon-scalar-optimizer lion --muon-momentum 0.8 --lion-beta1 0.9").errors
    assert "another optimizer: --use-distributed-optimizer True in the checkpoint, False in this run" in error
    assert "--muon-scalar-optimizer adam in the checkpoint, lion in this run" in error
    assert "--muon-momentum 0.9 in the checkpoint, 0.8 in this run; --lion-beta1 0.95 in" in error


# ---- What real runs do -----------------------------------------------------------------------------------------------


def rates_of(run: TrainingOutcome) -> dict[int, float]:
    """Return the logged learning rates by iteration."""
    return {event.step: event.value for event in read_scalars(run.folder)["learning-rate"]}


def cosine(iteration: int, highest: float, lowest: float, last: int, warmup: int = 3) -> float:
    share = (iteration - warmup) / (last - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


@pytest.mark.runs("another learning rate")
def test_overridden_learning_rate_is_the_one_that_trains(runs):
    """Megatron 0.19.2 alone fails, because it finds the saved parameter groups by their learning rates."""
    expected = {iteration: cosine(iteration, 1e-3, 0, 21) for iteration in range(8, 13)}
    assert rates_of(runs[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.runs("fp32", "shortened")
def test_shortened_run_has_the_same_data_and_an_earlier_end(runs):
    """The first loss does not depend on the new learning rate. The number of epochs stays the same."""
    unchanged, shortened = runs
    assert shortened.iterations == list(range(8, 13))
    assert shortened.curves["lm loss"][8] == unchanged.curves["lm loss"][8]
    assert shortened.curves["lm loss"][10] != unchanged.curves["lm loss"][10]
    expected = {iteration: cosine(iteration, 2e-3, 2e-4, 18) for iteration in range(8, 13)}
    assert rates_of(shortened) == pytest.approx(expected, rel=1e-5)


# Megatron alone fails with a blend of datasets, whose samples are used up.
COMPLETE = f"--train-iters 7 {OVERRIDE} --data-path 1 data 2 ended"


@pytest.fixture
def pretrain(runs, workplace, tmp_path, monkeypatch):
    """Pretrain in this process from the checkpoint of iteration 7 of the first run of the test, up to training."""

    def fail(*_: object) -> None:
        raise AssertionError("training begins")

    def pretrain(flags: str) -> None:
        run = Run(f"{flags} --load {runs[0].checkpoints} --ckpt-step 7", logs_scalars=False)
        monkeypatch.setattr(sys, "argv", ["pretrain", *workplace.flags(run, tmp_path)])
        monkeypatch.setattr(trainer, "meet_ranks", fail)
        monkeypatch.chdir(workplace.folder)
        try:
            trainer.main()
        finally:
            forget_megatrons_globals()

    return pretrain


@pytest.mark.runs("fp32")
def test_complete_run_ends_before_training(pretrain):
    pretrain(COMPLETE)
    with pytest.raises(AssertionError, match="training begins"):
        pretrain(COMPLETE.replace("--train-iters 7", "--train-iters 8"))
