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
from maskmoe.training.resume.settings_table import Rule, differences, names_of
from maskmoe.training.settings.samples import BatchSizes, requested_training_samples, training_iterations

_PAGE = "docs/extending.md"
# Arguments on which the order of the data depends with `--dataloader-type cyclic`.
_OF_CYCLIC_ORDER = ("data_sharding", "micro_batch_size", "data_parallel_size")


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
    saved = state.get("args")
    if saved is None or (schedule is not None and args.finetune):
        return ChangedSettings()
    if schedule is None:  # nothing is trained
        return ChangedSettings(notes=tuple(_notes_of_weights(args, saved)))
    errors = [*_errors_of_length(args, saved, iteration)]
    if not args.no_load_optim and "opt_param_scheduler" in state:
        errors += _errors_of_optimizer(args, saved, schedule, state["opt_param_scheduler"])
    is_complete = iteration >= training_iterations(args)
    notes = [_note_of_end(args)] if is_complete else _notes(args, saved, iteration)
    return ChangedSettings(tuple(f"checkpoint {checkpoint} {error}" for error in errors), tuple(notes), is_complete)


def schedule_of(args: Namespace) -> OptimizerParamScheduler:
    """Return the scheduler of validated arguments, without an optimizer; raise `UserError` if Megatron refuses it."""
    optimizer: Any = SimpleNamespace(param_groups=[])
    completed = copy(args)  # Megatron completes the arguments
    completed.step_batch_size_schedule = None  # for the number of iterations, which the scheduler does not use
    refused = "Megatron refuses the schedule of the learning rate or the weight decay"
    with megatrons_checks(refused), global_args(completed), redirect_stdout(None):
        return training.get_optimizer_param_scheduler(optimizer)


def has_one_learning_rate(args: Namespace) -> bool:
    """Return whether all parameters have the learning rate in `--lr`."""
    return args.decoupled_lr is None and not args.use_mup


def _errors_of_length(args: Namespace, saved: Namespace, iteration: int) -> Iterator[str]:
    """Yield an error if Megatron would compute a wrong last iteration from `--train-samples` and the batch size."""
    samples = getattr(saved, "consumed_train_samples", None)
    if args.train_samples is None or samples is None:
        return
    iterations = BatchSizes.from_args(args).iterations(samples)
    if iterations != iteration:
        yield (
            f"has read {samples:,} samples in {iteration} iterations, which are {iterations} iterations with this "
            f"run's batch sizes, so training would not end at --train-samples {args.train_samples}: pass a "
            f"--step-batch-size-schedule that begins with the checkpoint's batch sizes, or --train-iters ({_PAGE})"
        )


def _errors_of_optimizer(
    args: Namespace, saved: Namespace, schedule: OptimizerParamScheduler, saved_schedule: dict[str, Any]
) -> Iterator[str]:
    """Yield an error for each change of the optimizer or the schedule with which the run cannot load their states."""
    if changed := differences(args, saved, names_of(Rule.OPTIMIZER)):
        yield (
            f"holds the state of another optimizer: {changed}; pass the checkpoint's settings, or --no-load-optim to "
            "begin with a new optimizer and a new schedule, and remove --no-load-optim after the first checkpoint "
            f"({_PAGE})"
        )
    changed = ""
    try:
        copy(schedule).load_state_dict(saved_schedule)
        # The schedule counts samples, so Megatron accepts fewer iterations with a larger batch.
        if not (args.train_samples or args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
            changed = differences(args, saved, ["global_batch_size"])
    except AssertionError as refusal:
        changed = reason_of(refusal)
    if changed:
        yield (
            f"was saved with another schedule of learning rate and weight decay ({changed}): pass "
            "--override-opt-param-scheduler to continue by this run's schedule, the checkpoint's settings to keep its "
            f"schedule, or --finetune with another --save to start anew from the weights ({_PAGE})"
        )


def _note_of_end(args: Namespace) -> str:
    """Return the note of a run whose checkpoint has reached the end of training."""
    end = f"--train-samples {args.train_samples}" if args.train_samples else f"--train-iters {args.train_iters}"
    return f"the checkpoint has reached {end}: nothing is left to train; to train on, pass a larger number ({_PAGE})"


def _notes(args: Namespace, saved: Namespace, iteration: int) -> Iterator[str]:
    """Yield a note for each change that takes effect although nobody asked for it."""
    if args.no_load_optim:
        yield (
            f"--no-load-optim: a new optimizer continues at iteration {iteration}, and the schedule of the learning "
            "rate begins anew, at every start: remove the flag after the first checkpoint"
        )
    consumed = getattr(saved, "consumed_train_samples", 0)
    before, now = (requested_training_samples(each, iteration, consumed) for each in (saved, args))
    of_order = [*names_of(Rule.DATA), *(_OF_CYCLIC_ORDER if args.dataloader_type == "cyclic" else ())]
    if changed := differences(args, saved, of_order):
        yield (
            f"the training data are in another order ({changed}): the run continues at sample {consumed:,} of the new "
            "order, so it may repeat samples and leave samples out"
        )
    elif before != now and not args.mock_data:
        yield (
            f"the run reads {now:,} samples, not {before:,}: if these are other epochs of a dataset, Megatron shuffles "
            f"the data into another order ({_PAGE}), and the run may repeat samples and leave samples out"
        )
    yield from _notes_of_weights(args, saved)


def _notes_of_weights(args: Namespace, saved: Namespace) -> Iterator[str]:
    """Yield a note if the checkpoint's weights compute something else than in the run that saved them."""
    if changed := differences(args, saved, names_of(Rule.TRAINED_WITH, Rule.FUNCTION)):
        yield f"the checkpoint's weights were trained with other settings: {changed}"
