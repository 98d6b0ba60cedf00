"""Judges how a run's settings differ from those of the checkpoint that it resumes from; see `settings_table`.

`maskmoe.training.resume.model_settings` compares models and tokenizers. What Megatron itself refuses is not here.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training

from maskmoe.checkpoint.integrity import iteration_of
from maskmoe.checkpoint.reading import read_common_state
from maskmoe.errors import megatrons_checks, reason_of
from maskmoe.megatron_compat.globals import global_args
from maskmoe.training.resume.choose_checkpoint import must_save_a_complete_run
from maskmoe.training.resume.settings_table import Changes, Rule, names_of
from maskmoe.training.settings.layout import BatchSizes, requested_training_samples, training_iterations

_PAGE = "docs/extending.md"
_ANEW = (
    "--no-load-optim to begin with a new optimizer and a new schedule, and remove --no-load-optim after the first "
    f"checkpoint ({_PAGE})"
)


@dataclass(frozen=True)
class ChangedSettings:
    """The differences between a run and the run that saved its checkpoint.

    Attributes:
        errors: The changes with which the run would fail, or that it would ignore; one line each.
        notes: The changes that take effect, one line each.
        is_complete: Whether the checkpoint has reached the end of training.
    """

    errors: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_complete: bool = False


def find_changed_settings(args: Namespace, checkpoint: Path | None) -> ChangedSettings:
    """Compare validated settings with a checkpoint's, if there is one; raise `UserError` for a refused schedule."""
    schedule = None if args.skip_train else schedule_of(args)
    iteration = None if checkpoint is None else iteration_of(checkpoint)
    if checkpoint is None or iteration is None:  # a converted checkpoint has weights only
        return ChangedSettings()
    state = read_common_state(checkpoint)
    if "args" not in state or (schedule is not None and args.finetune):
        return ChangedSettings()
    changes = Changes(args, state["args"])
    if schedule is None:  # nothing is trained
        return ChangedSettings(notes=tuple(_notes_of_function(changes)))
    is_complete = iteration >= training_iterations(args)
    errors = [*_errors_of_length(changes, iteration), *_errors_of_optimizer(changes, state, schedule)]
    is_loaded = not is_complete or must_save_a_complete_run(args)
    if getattr(changes.saved, "no_save_optim", False) and not args.no_load_optim and is_loaded:
        errors.append(f"was saved with --no-save-optim and holds no state of the optimizer: pass {_ANEW}")
    notes = _notes_of_end(args) if is_complete else _notes(changes, iteration)
    return ChangedSettings(tuple(f"checkpoint {checkpoint} {error}" for error in errors), tuple(notes), is_complete)


def schedule_of(args: Namespace) -> OptimizerParamScheduler:
    """Return the scheduler of validated arguments, without an optimizer; raise `UserError` if Megatron refuses it."""
    optimizer: Any = SimpleNamespace(param_groups=[])
    completed = copy(args)  # Megatron completes the arguments
    completed.step_batch_size_schedule = None  # for the number of iterations, which the scheduler does not use
    refused = "Megatron refuses the schedule of the learning rate or the weight decay"
    with megatrons_checks(refused), global_args(completed), redirect_stdout(None):
        return training.get_optimizer_param_scheduler(optimizer)


def take_schedule_of_checkpoint(args: Namespace, checkpoint: Path) -> None:
    """With `--use-checkpoint-opt-param-scheduler`, set all arguments of the schedule to those of the checkpoint.

    Megatron itself loads the schedule, but then fails if the learning rates of the command line differ, and applies the
    weight decay of the command line in the first iteration.
    """
    if not args.use_checkpoint_opt_param_scheduler or args.finetune or args.no_load_optim:
        return
    saved = read_common_state(checkpoint).get("args", Namespace())
    for name in names_of(Rule.SCHEDULE):
        if hasattr(saved, name) and name not in ("train_iters", "train_samples", "global_batch_size"):
            setattr(args, name, getattr(saved, name))


def has_one_learning_rate(args: Namespace) -> bool:
    """Return whether all parameters have the learning rate in `--lr`."""
    return args.decoupled_lr is None and not args.use_mup


def _errors_of_length(changes: Changes, iteration: int) -> Iterator[str]:
    """Yield an error if Megatron would compute a wrong last iteration from `--train-samples` and the batch size."""
    args, samples = changes.args, getattr(changes.saved, "consumed_train_samples", None)
    if args.train_samples is None or samples is None:
        return
    iterations = BatchSizes.from_args(args).iterations(samples)
    if iterations != iteration:
        yield (
            f"has read {samples:,} samples in {iteration} iterations, which are {iterations} iterations with this "
            f"run's batch sizes, so training would not end at --train-samples {args.train_samples}: pass a "
            f"--step-batch-size-schedule that begins with the checkpoint's batch sizes, or --train-iters ({_PAGE})"
        )


def _errors_of_optimizer(changes: Changes, state: dict[str, Any], schedule: OptimizerParamScheduler) -> Iterator[str]:
    """Yield an error for each change of the optimizer or the schedule with which the run cannot load their states."""
    args = changes.args
    if args.no_load_optim or "opt_param_scheduler" not in state:
        return
    for rule, problem in (
        (Rule.OPTIMIZER, "holds the state of another optimizer"),
        (Rule.IGNORED, "holds other settings of the optimizer, which Megatron would silently load"),
    ):
        if changed := changes.describe(names_of(rule)):
            yield f"{problem}: {changed}; pass the checkpoint's setting, or {_ANEW}"
    if changed := _changed_schedule(changes, state["opt_param_scheduler"], schedule):
        yield (
            f"was saved with another schedule of learning rate and weight decay ({changed}): pass "
            "--override-opt-param-scheduler to continue by this run's schedule, --use-checkpoint-opt-param-scheduler "
            f"to keep the checkpoint's, or --finetune with another --save to start anew from the weights ({_PAGE})"
        )


def _changed_schedule(changes: Changes, saved: dict[str, Any], schedule: OptimizerParamScheduler) -> str:
    """Describe how a schedule differs from the checkpoint's; empty if it is equal, or a flag says which one holds."""
    args = changes.args
    try:
        copy(schedule).load_state_dict(saved)
        # The scheduler counts samples, so it accepts fewer iterations with a larger batch.
        is_asked_for = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
        if args.train_samples or is_asked_for or not changes.describe(["global_batch_size"]):
            return ""
        return changes.describe(names_of(Rule.SCHEDULE))
    except AssertionError as refusal:
        return changes.describe(names_of(Rule.SCHEDULE)) or reason_of(refusal)


def _notes_of_end(args: Namespace) -> Iterator[str]:
    """Yield the note of a run whose checkpoint has reached the end of training."""
    flag = "--train-iters" if args.train_samples is None else "--train-samples"
    yield (
        f"the checkpoint has reached {flag} {args.train_samples or args.train_iters}: nothing is left to train; to "
        f"train on, pass more {flag} ({_PAGE})"
    )


def _notes(changes: Changes, iteration: int) -> Iterator[str]:
    """Yield a note for each change that takes effect although nobody asked for it."""
    args, saved = changes.args, changes.saved
    if args.no_load_optim:
        yield (
            f"--no-load-optim: a new optimizer continues at iteration {iteration}, and the schedule of the learning "
            "rate begins anew, at every start: remove the flag after the first checkpoint"
        )
    consumed = getattr(saved, "consumed_train_samples", 0)
    consequence = (
        f"the run continues at sample {consumed:,} of the new order, so it may repeat samples and leave samples out"
    )
    is_cyclic = args.dataloader_type == "cyclic"
    of_cyclic = ("data_sharding", "micro_batch_size", "data_parallel_size") if is_cyclic else ()
    before, now = (requested_training_samples(each, iteration, consumed) for each in (saved, args))
    if changed := changes.describe((*names_of(Rule.DATA), *of_cyclic)):
        yield f"the training data are in another order ({changed}): {consequence}"
    elif before != now and not args.mock_data:
        yield (
            f"the run reads {now:,} samples, not {before:,}: if these are other epochs of a dataset, Megatron shuffles "
            f"the data into another order ({_PAGE}); then {consequence}"
        )
    yield from _notes_of_function(changes)


def _notes_of_function(changes: Changes) -> Iterator[str]:
    """Yield a note if the checkpoint's weights compute something else than in the run that saved them."""
    if changed := changes.describe(names_of(Rule.TRAINED_WITH, Rule.FUNCTION)):
        yield f"the checkpoint's weights were trained with other settings: {changed}"
