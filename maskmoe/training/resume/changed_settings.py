"""Compares the settings of a run with the settings of the checkpoint that the run resumes from.

`maskmoe.training.resume.model_settings` compares models and tokenizers. This module judges everything else that
Megatron refuses late, ignores, or changes as a side effect: schedules, optimizer, order of the data, and routing.
"""

import re
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
from maskmoe.checkpoint.routing_mask import mask_in_checkpoint
from maskmoe.errors import UserError, reason_of
from maskmoe.megatron_compat.globals import global_args
from maskmoe.training.resume.choose_checkpoint import must_save_a_complete_run
from maskmoe.training.resume.model_settings import ADJUSTABLE_ARGUMENTS, flag_of
from maskmoe.training.settings.layout import BatchSizes, requested_training_samples, training_iterations

_PAGE = "docs/extending.md"
# Arguments of the schedules of learning rate and weight decay.
_SCHEDULE_ARGUMENTS = (
    *("lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "lr_decay_style", "lr_decay_iters", "lr_decay_samples"),
    *("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init"),
    *("lr_wsd_decay_iters", "lr_wsd_decay_samples", "lr_wsd_decay_style"),
    *("weight_decay", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style"),
)
# The flags behind the values that Megatron's scheduler compares.
_FLAGS_OF_SCHEDULE = {
    "lr_warmup_steps": "the warm-up (--lr-warmup-iters, -samples or -fraction)",
    "lr_decay_steps": "the decay (--lr-decay-iters or -samples, by default the whole training)",
    "wsd_decay_steps": "--lr-wsd-decay-iters or -samples",
    "init_lr": "--lr-warmup-init",
    "min_lr": "--min-lr",
    "max_lr": "--lr",
    "start_wd": "--start-weight-decay",
    "end_wd": "--end-weight-decay",
}
# Arguments from which Megatron computes the lengths of the schedules.
_LENGTHS = ("train_iters", "train_samples", "global_batch_size")
# Arguments that decide which state an optimizer has. With another value, Megatron fails on every rank.
_OPTIMIZER_ARGUMENTS = (
    *("optimizer", "use_distributed_optimizer", "use_layer_wise_distributed_optimizer"),
    *("muon_scalar_optimizer", "decoupled_lr", "decoupled_min_lr"),
)
# The distributed optimizer has the same state in every precision.
_PRECISION_ARGUMENTS = ("bf16", "fp16")
# Arguments whose values an optimizer loads with its state. Megatron ignores the values of the command line.
_LOADED_WITH_OPTIMIZER = (
    *("adam_beta1", "adam_beta2", "adam_eps"),
    *("muon_momentum", "lion_beta1", "lion_beta2"),
)
# Arguments that decide the order of the training data.
_DATA_ARGUMENTS = (
    *("data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "mock_data", "split"),
    *("seq_length", "seed", "dataloader_type", "fim_data"),
)
# Further arguments that decide the order of --dataloader-type cyclic.
_CYCLIC_ARGUMENTS = ("data_sharding", "micro_batch_size", "data_parallel_size")
# Arguments that change what the checkpoint's weights compute.
_FUNCTION_ARGUMENTS = (
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("rotary_base", "rotary_percent", "padded_vocab_size"),
    *("moe_router_force_load_balancing", "moe_router_force_biased"),
    *ADJUSTABLE_ARGUMENTS,
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
    saved = state.get("args")
    if saved is None:
        return ChangedSettings()
    if schedule is None:  # nothing is trained
        return ChangedSettings(notes=tuple(_notes_of_function(args, saved)))
    if args.finetune:
        return ChangedSettings()
    resumption = _Resumption(args, checkpoint, saved, state.get("opt_param_scheduler"), schedule, iteration)
    return ChangedSettings(tuple(resumption.errors()), tuple(resumption.notes()), resumption.is_complete)


def schedule_of(args: Namespace) -> OptimizerParamScheduler:
    """Return the scheduler of validated arguments, without an optimizer; raise `UserError` if Megatron refuses it."""
    optimizer: Any = SimpleNamespace(param_groups=[])
    completed = copy(args)  # Megatron completes the arguments
    completed.step_batch_size_schedule = None  # for the number of iterations, which the scheduler does not use
    try:
        with global_args(completed), redirect_stdout(None):
            return training.get_optimizer_param_scheduler(optimizer)
    except AssertionError as error:
        # Most of Megatron's assertions have no message, so the reason is their source line.
        reason = (
            re.sub(r"(?:self\.)?\b(\w+)", lambda name: _FLAGS_OF_SCHEDULE.get(name[1], name[1]), reason_of(error))
            .replace("assert ", "it needs ")
            .removesuffix(" is not None")
        )
        raise UserError(f"Megatron refuses the schedule of the learning rate or the weight decay: {reason}") from error


def take_schedule_of_checkpoint(args: Namespace, checkpoint: Path) -> None:
    """With `--use-checkpoint-opt-param-scheduler`, set all arguments of the schedule to those of the checkpoint.

    Megatron itself loads the schedule, but then fails if the learning rates of the command line differ, and applies the
    weight decay of the command line in the first iteration.
    """
    if not args.use_checkpoint_opt_param_scheduler or args.finetune or args.no_load_optim:
        return
    saved = read_common_state(checkpoint).get("args", Namespace())
    for name in _SCHEDULE_ARGUMENTS:
        if hasattr(saved, name):
            setattr(args, name, getattr(saved, name))


@dataclass(frozen=True)
class _Resumption:
    """A run that resumes from a checkpoint with its iteration.

    Attributes:
        saved: The arguments in the checkpoint.
        state: The state of the scheduler in the checkpoint; None if the checkpoint has none.
        schedule: The scheduler of the run.
    """

    args: Namespace
    checkpoint: Path
    saved: Namespace
    state: dict[str, Any] | None
    schedule: OptimizerParamScheduler
    iteration: int

    @property
    def is_complete(self) -> bool:
        """Whether training ends at or before the iteration of the checkpoint."""
        return self.iteration >= training_iterations(self.args)

    @property
    def _loads(self) -> bool:
        """Whether the run loads the checkpoint; a complete run does so only to save it into a folder that lacks it."""
        return not self.is_complete or must_save_a_complete_run(self.args)

    def errors(self) -> Iterator[str]:
        """Yield an error for each change with which the run would fail, or that the run would ignore."""
        args = self.args
        anew = (
            "--no-load-optim to begin with a new optimizer and a new schedule, and remove --no-load-optim after the "
            f"first checkpoint ({_PAGE})"
        )
        yield from self._errors_of_length()
        yield from self._errors_of_cyclic_data()
        if getattr(self.saved, "no_save_optim", False) and not args.no_load_optim and self._loads:
            yield (
                f"checkpoint {self.checkpoint} was saved with --no-save-optim and holds no state of the optimizer: "
                f"pass {anew}"
            )
        if args.no_load_optim or self.state is None:
            return
        # Only a run with --change-routing-mask can continue a checkpoint without a routing mask.
        is_undivided = self.saved.num_experts and self.saved.expert_model_parallel_size == 1
        if args.change_routing_mask and is_undivided and mask_in_checkpoint(self.checkpoint) is None:
            yield (
                f"checkpoint {self.checkpoint} is of Megatron-Core's own model without expert parallelism, so its "
                f"experts share the optimizer of all parameters, which MaskMoE cannot load: pass {anew}"
            )
        if args.fp16 and not args.loss_scale and getattr(self.saved, "loss_scale", None):
            yield (
                f"checkpoint {self.checkpoint} was saved with --loss-scale {self.saved.loss_scale:g} and holds no "
                f"state of a dynamic loss scale: pass the flag, or {anew}"
            )
        precision = () if args.use_distributed_optimizer else _PRECISION_ARGUMENTS
        for names, problem in (
            ((*_OPTIMIZER_ARGUMENTS, *precision), "holds the state of another optimizer"),
            (_LOADED_WITH_OPTIMIZER, "holds other settings of the optimizer, which Megatron would load without a word"),
        ):
            if changed := _changes(args, self.saved, names):
                yield f"checkpoint {self.checkpoint} {problem}: {changed}; pass the checkpoint's setting, or {anew}"
        lengths, differences = (*_LENGTHS, *_SCHEDULE_ARGUMENTS), ""
        try:
            copy(self.schedule).load_state_dict(self.state)
            # The scheduler counts samples, so it accepts fewer iterations with a larger batch.
            is_asked_for = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
            if not (args.train_samples or is_asked_for) and _changes(args, self.saved, ("global_batch_size",)):
                differences = _changes(args, self.saved, lengths)
        except AssertionError as refusal:
            differences = _changes(args, self.saved, lengths) or reason_of(refusal)
        if differences:
            yield (
                f"checkpoint {self.checkpoint} was saved with another schedule of learning rate and weight decay "
                f"({differences}): pass --override-opt-param-scheduler to continue by this run's schedule, "
                "--use-checkpoint-opt-param-scheduler to keep the checkpoint's, or --finetune with another --save to "
                f"start anew from the weights ({_PAGE})"
            )
        rates = _changes(args, self.saved, ("lr", "min_lr"))
        if rates and args.override_opt_param_scheduler and not has_one_learning_rate(args):
            yield (
                "--override-opt-param-scheduler cannot change --lr or --min-lr of a run with --decoupled-lr or "
                f"--use-mup, whose parameters have several learning rates: {rates}"
            )

    def _errors_of_length(self) -> Iterator[str]:
        """Yield an error if Megatron would compute a wrong last iteration from `--train-samples` and the batch size."""
        args, samples = self.args, getattr(self.saved, "consumed_train_samples", None)
        if args.train_samples is None or samples is None:
            return
        iterations = BatchSizes.from_args(args).iterations(samples)
        if iterations != self.iteration:
            yield (
                f"checkpoint {self.checkpoint} has read {samples:,} samples in {self.iteration} iterations, which are "
                f"{iterations} iterations with this run's batch sizes, so training would not end at --train-samples "
                f"{args.train_samples}: pass a --step-batch-size-schedule that begins with the checkpoint's batch "
                f"sizes, or --train-iters ({_PAGE})"
            )

    def _errors_of_cyclic_data(self) -> Iterator[str]:
        """Yield an error if Megatron's sampler of cyclic data would fail: it cannot resume within a micro-batch."""
        args = self.args
        if args.dataloader_type != "cyclic":
            return
        # A complete run evaluates if it is loaded.
        evaluates = self._loads and args.eval_iters > 0
        for part, consumed, name, is_read in (
            ("training", "consumed_train_samples", "micro_batch_size", not self.is_complete),
            ("validation", "consumed_valid_samples", "eval_micro_batch_size", evaluates),
        ):
            samples, size = getattr(self.saved, consumed, 0), getattr(args, name)
            step, flag = size * args.data_parallel_size, flag_of(name)
            if is_read and samples % step:
                yield (
                    f"checkpoint {self.checkpoint} has read {samples:,} samples of the {part} data, but "
                    f"--dataloader-type cyclic can resume only after a multiple of {flag} {size} × data parallel size "
                    f"{args.data_parallel_size} = {step}: pass a smaller {flag}, or use fewer ranks"
                )

    def notes(self) -> Iterator[str]:
        """Yield a note for each change that takes effect although nobody asked for it."""
        args = self.args
        if self.is_complete:
            flag = "--train-iters" if args.train_samples is None else "--train-samples"
            yield (
                f"checkpoint {self.checkpoint} has reached {flag} {args.train_samples or args.train_iters}: nothing is "
                f"left to train; to train on, pass more {flag} ({_PAGE})"
            )
            return
        if args.no_load_optim:
            yield (
                f"--no-load-optim: a new optimizer continues at iteration {self.iteration}, and the schedule of the "
                "learning rate begins anew, at every start: remove the flag after the first checkpoint"
            )
        yield from self._notes_of_data()
        yield from _notes_of_function(args, self.saved)

    def _notes_of_data(self) -> Iterator[str]:
        """Yield a note if the training data, or their order, are not those of the checkpoint's run."""
        consumed = getattr(self.saved, "consumed_train_samples", 0)
        consequence = (
            f"the run continues at sample {consumed:,} of the new order, so it may repeat samples and leave samples out"
        )
        names = (*_DATA_ARGUMENTS, *(_CYCLIC_ARGUMENTS if self.args.dataloader_type == "cyclic" else ()))
        if changed := _changes(self.args, self.saved, names):
            yield f"the training data are in another order ({changed}): {consequence}"
            return
        before = requested_training_samples(self.saved, iteration_of(self.checkpoint) or 0, consumed)
        now = requested_training_samples(self.args, self.iteration, consumed)
        if before != now and not self.args.mock_data:
            yield (
                f"the run reads {now:,} samples, not {before:,}: if these are other epochs of a dataset, Megatron "
                f"shuffles the data into another order ({_PAGE}); then {consequence}"
            )


def has_one_learning_rate(args: Namespace) -> bool:
    """Return whether all parameters have the learning rate in `--lr`."""
    return args.decoupled_lr is None and not args.use_mup


def _notes_of_function(args: Namespace, saved: Namespace) -> Iterator[str]:
    """Yield a note if the checkpoint's weights compute something else than in the run that saved them."""
    if changed := _changes(args, saved, _FUNCTION_ARGUMENTS):
        yield f"the checkpoint's weights were trained with other settings: {changed}"


def _changes(args: Namespace, saved: Namespace, names: tuple[str, ...]) -> str:
    """Describe the arguments whose values differ from those in the checkpoint; empty if there are none."""
    changed = []
    for name in names:
        if not hasattr(saved, name) or not hasattr(args, name) or _is_derived_or_unused(args, saved, name):
            continue
        before, now = getattr(saved, name), getattr(args, name)
        if before != now and not (name.endswith("data_path") and _absolute(before) == _absolute(now)):
            changed.append(f"{flag_of(name)} {_text(before)} in the checkpoint, {_text(now)} in this run")
    return "; ".join(changed)


def _is_derived_or_unused(args: Namespace, saved: Namespace, name: str) -> bool:
    """Return whether Megatron derives a differing argument from other arguments, or does not use it."""
    if name in ("lr_decay_iters", "lr_decay_samples"):
        return getattr(args, name) is None  # from --train-iters or --train-samples
    if name == "train_iters":
        return args.train_samples is not None and getattr(saved, "train_samples", None) is not None
    if name == "global_batch_size":  # from --micro-batch-size
        return any(getattr(each, "step_batch_size_schedule", None) is not None for each in (args, saved))
    if name.endswith("distributed_optimizer"):  # both from one flag and the optimizer
        return args.optimizer != getattr(saved, "optimizer", args.optimizer)
    optimizers = {args.optimizer, getattr(saved, "optimizer", args.optimizer)}
    if name.startswith("muon_"):
        return optimizers <= {"adam", "sgd"}
    if name.startswith("lion_"):
        return optimizers <= {"adam", "sgd", "lion"}  # Lion reads Adam's flags
    return False


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _absolute(words: list[str] | None) -> list[str] | None:
    """Return the words of `--data-path` with absolute paths; weights become paths, too, which is harmless."""
    return None if words is None else [str(Path(word).resolve()) for word in words]
