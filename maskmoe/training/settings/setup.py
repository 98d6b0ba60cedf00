"""Turns the command line into a checked configuration, before any process group exists."""

import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_args, validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from maskmoe.checkpoint.non_persistent import is_non_persistent
from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import iteration_of
from maskmoe.command_line.parser import refuse_unknown_flags
from maskmoe.errors import UserError, reason_of
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.globals import get_tokenizer, set_globals_without_writers
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.routing_mask.change import MaskChange
from maskmoe.routing_mask.frequency import files_of_data_path
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.loop import fill_in_middle
from maskmoe.training.loop.model_builder import MaskMoEGPTModelConfig, MaskMoEHybridModelConfig, MaskMoEModelConfig
from maskmoe.training.loop.rank_store import RankStore, check_launched
from maskmoe.training.resume import choose_checkpoint as resume
from maskmoe.training.resume import model_settings
from maskmoe.training.resume.save_folder import check_save_folder_is_own
from maskmoe.training.settings import file_checks
from maskmoe.training.settings.arguments import add_maskmoe_arguments, may_change_mask
from maskmoe.training.settings.changed_settings import find_changed_settings, take_schedule_of_checkpoint
from maskmoe.training.settings.flag_ranges import check_ranges
from maskmoe.training.settings.layer_division import layer_errors
from maskmoe.training.settings.layer_pattern import ignored_flags, pattern_errors
from maskmoe.training.settings.layout import size_errors
from maskmoe.training.settings.refusals import check_supported
from maskmoe.training.settings.required_flags import missing_flags
from maskmoe.training.watch.console import console
from maskmoe.training.watch.wandb_run import wandb_defaults
from maskmoe.transformer.visible_experts import check_same_mask

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


class CheckedRun(NamedTuple):
    """A run whose settings and files this rank has checked.

    Attributes:
        args: Megatron's validated arguments.
        mask: The routing mask; None for a model without experts.
        is_complete: Whether the checkpoint has reached the last iteration, so that nothing is left to train.
    """

    args: Namespace
    mask: RoutingMask | None
    is_complete: bool


def parse_and_check_args(
    own_arguments: ArgumentsProvider = lambda parser: parser, reads_data: Callable[[Namespace], bool] = lambda _: True
) -> CheckedRun:
    """Parse the command line, check all settings and files in it, and set Megatron's global variables.

    The function changes no file and makes none, and does not open Megatron's writers.

    Args:
        own_arguments: Adds the arguments of one entry point to the arguments of all entry points.
        reads_data: Returns whether the entry point needs a dataset with these arguments.

    Raises:
        UserError: Settings that cannot work together, or a file that is missing, damaged or does not fit.
    """
    console.load("checking settings and files")
    chosen: dict[str, Any] = {}

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = own_arguments(add_maskmoe_arguments(parser))
        parser.set_defaults(**chosen)
        refuse_unknown_flags(parser, sys.argv[1:])
        return parser

    # Choose the checkpoint, whose settings may complete the command line.
    args = parse_args(add_arguments)
    check_ranges(args)
    ranks = RankStore.from_environment()
    checkpoint = resume.find_checkpoint(args, ranks)
    resume.check_not_missing(args, checkpoint)
    if checkpoint is not None and (iteration := iteration_of(checkpoint)) is not None:
        # Pass the choice to Megatron by `--ckpt-step`, as a user would.
        args.ckpt_step = chosen["ckpt_step"] = iteration
        args.loads_non_persistent = chosen["loads_non_persistent"] = is_non_persistent(args, checkpoint)
    if args.use_checkpoint_args:
        if checkpoint is None:
            found = "" if args.load is None else f"; --load {args.load} holds no checkpoint"
            raise UserError(f"--use-checkpoint-args needs --load with the folder of the checkpoints{found}")
        # Set them as defaults, so that the command line overrides them.
        chosen |= model_settings.further_checkpoint_args(args, checkpoint)
        args = model_settings.take_settings_of_checkpoint(parse_args(add_arguments), checkpoint)
        check_ranges(args)
    # Check settings and files, before and after Megatron validates and completes the arguments.
    check_supported(args)
    for error in chain(missing_flags(args, checkpoint is not None), pattern_errors(args), layer_errors(args)):
        raise UserError(error)
    for note in ignored_flags(args):
        console.say(f"note: {note}")
    _report_missing_packages()
    tokenizer_sha256 = file_checks.check_tokenizer(args)
    file_checks.check_save_folder(args)
    check_save_folder_is_own(args, checkpoint)
    mask = find_routing_mask(args, checkpoint, console.say)
    vars(args).update(wandb_defaults(args))
    with megatrons_checks():
        validate_args(args)
        set_globals_without_writers(args)
    for error in size_errors(args, 0 if checkpoint is None else iteration_of(checkpoint) or 0):
        raise UserError(error)
    args.tokenizer_sha256 = tokenizer_sha256  # saved with the other arguments in every checkpoint
    if checkpoint is not None:
        model_settings.check_same_model(args, checkpoint)
        take_schedule_of_checkpoint(args, checkpoint)
    resume.check_pretrained_model(args, checkpoint, ranks)
    if args.loads_non_persistent:
        args.pretrained_checkpoint = None  # Megatron would prefer it if there is no persistent checkpoint
    if mask is not None:
        file_checks.check_mask(args, mask)
    if args.fim_data:
        fill_in_middle.check_tokens(args)
    if reads_data(args):
        # The first rank of each node reads the token ids of each dataset once.
        is_first_of_node = os.environ.get("LOCAL_RANK", "0") == "0"
        file_checks.check_data(args, mask, get_tokenizer().vocab_size, math.inf if is_first_of_node else 0)
    changed = find_changed_settings(args, checkpoint)
    for error in changed.errors:
        raise UserError(error)
    for note in changed.notes:
        console.say(f"note: {note}")
    return CheckedRun(args, mask, changed.is_complete)


def _report_missing_packages() -> None:
    """Print one line on the first rank if the defaults were chosen for a GPU without Transformer Engine or Apex."""
    missing = None if cpu.is_installed() else GpuPackages.installed().describe_missing()
    if missing:
        console.say(f"note: {missing}")


def find_routing_mask(args: Namespace, checkpoint: Path | None, report: Callable[[str], None]) -> RoutingMask | None:
    """Return the routing mask in `--routing-mask` or, without the flag, of the checkpoint; None without experts.

    Args:
        args: Megatron's arguments.
        checkpoint: The checkpoint to load, if there is one.
        report: Takes one line about the change of masks if the arguments have `--change-routing-mask`.

    Raises:
        UserError: No mask is given, or the mask of the flag and the mask of the checkpoint differ although the
            arguments lack `--change-routing-mask`, or in their sizes.
    """
    if not args.num_experts:
        return None
    masks = [read_routing_mask(source) for source in (args.routing_mask, checkpoint) if source is not None]
    if not masks:
        raise UserError("no routing mask: pass --routing-mask FILE, made by maskmoe mask, or --load a checkpoint")
    own, of_checkpoint = masks[0], masks[-1]
    if may_change_mask(args):
        report(f"routing mask: {_describe_change(of_checkpoint, own, args.expert_model_parallel_size)}")
    else:
        is_training = hasattr(args, "change_routing_mask")
        cure = "; pass --change-routing-mask to change visible experts on purpose" if is_training else ""
        check_same_mask(own.digest, of_checkpoint.digest, cure)
    return own


def _describe_change(old: RoutingMask, new: RoutingMask, num_ranks: int) -> str:
    """Describe how the mask of a run differs from the mask of the checkpoint, in one line.

    Args:
        old: The mask of the checkpoint; the mask of the run if no checkpoint is loaded.
        new: The mask of the run.
        num_ranks: Expert-parallel ranks of the run.

    Raises:
        UserError: The masks have different sizes.
    """
    if old.digest == new.digest:
        return (
            f"--change-routing-mask changes nothing, no checkpoint with another mask than {new.digest[:16]}… is loaded"
        )
    described = f"{old.digest[:16]}… of the checkpoint → {new.digest[:16]}…: {MaskChange.between(old, new)}"
    if num_ranks > 1 and new.num_experts % num_ranks == 0:
        was_local, is_local = (mask.rank_of_rows(num_ranks) is not None for mask in (old, new))
        if was_local != is_local:
            described += f"; the visible experts of each id are {'now' if is_local else 'no longer'} on one rank"
    return described


def load_model(args: Namespace) -> torch.nn.Module:
    """Initialise Megatron and return this rank's part of the model, with the weights of the checkpoint in `--load`.

    Megatron's writers stay closed, since only training logs to them.

    Raises:
        UserError: `--load` holds no checkpoint, the pipeline is interleaved, which is for training only, or no launcher
            has started this rank.
    """
    if resume.checkpoint_to_load(args) is None:
        found = "" if args.load is None else f"; --load {args.load} holds no checkpoint"
        raise UserError(f"pass --load with the folder of the checkpoints{found}")
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UserError(
            "interleaved pipelines are for training only; leave --num-layers-per-virtual-pipeline-stage out, or give "
            "--hybrid-layer-pattern as many stages as --pipeline-model-parallel-size"
        )
    check_launched()
    console.load("building the model and reading the checkpoint")
    ranks = RankStore.from_environment()
    ranks.wait_for_all("checks")
    resume.repair_tracker_file(args, ranks)
    config = model_config_from_args(args)
    initialize_megatron(get_embedding_ranks=embedding_ranks_of(config), store=ranks.for_process_groups)
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model[0]


def embedding_ranks_of(config: MaskMoEModelConfig) -> Callable[[list[int]], list[int]]:
    """Return a function from the ranks of a pipeline to those ranks that have a copy of the embedding.

    These ranks are the first, the last if embedding and output layer share their weights, and all ranks with layers of
    multi-token prediction. Megatron adds up the gradients of the copies. The function is that of `pretrain_gpt.py` of
    Megatron-LM; by default, Megatron-Core takes the first and the last rank.
    """

    def embedding_ranks(ranks: list[int]) -> list[int]:
        found = {ranks[0]}
        if config.share_embeddings_and_output_weights:
            found.add(ranks[-1])
        if config.mtp_num_layers:
            found.update(get_mtp_ranks(ranks, config.transformer))
        return sorted(found)

    return embedding_ranks


def model_config_from_args(args: Namespace) -> MaskMoEModelConfig:
    """Return the configuration of the model that the command line describes.

    Raises:
        UserError: Settings that cannot work together.
    """
    with megatrons_checks():
        if args.hybrid_layer_pattern is None:
            config = gpt_config_from_args(args, model_config_cls=MaskMoEGPTModelConfig)
        else:
            config = hybrid_config_from_args(args, model_config_cls=MaskMoEHybridModelConfig)
            config.rope_scaling = args.use_rope_scaling
    if args.num_experts:
        # `find_routing_mask` refuses a run without a mask.
        checkpoint = resume.checkpoint_to_load(args)
        config.routing_mask = Path(cast(Path, args.routing_mask or checkpoint))
        if not config.transformer.gated_linear_unit:
            # Megatron-Core's fused activation functions that also weigh the rows of an expert exist only with a gate.
            config.transformer.bias_activation_fusion = False
        config.replaced_routing_mask = checkpoint if may_change_mask(args) else None
    config.aux_loss_tokens = args.moe_aux_loss_tokens
    config.qk_layernorm_all_heads = args.qk_layernorm_all_heads
    config.rope_scaling_factor = args.rope_scaling_factor  # Megatron-Core 0.19 leaves it at its default
    return config


@contextmanager
def megatrons_checks() -> Iterator[None]:
    """Turn the errors of Megatron's own checks of the settings into a `UserError`.

    Many of these checks are assertions without a message. The message is then the source line of the assertion.

    Raises:
        UserError: Megatron refuses the settings.
    """
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"invalid settings: {reason_of(error)}") from error


@contextmanager
def leaving_process_groups() -> Iterator[None]:
    """Destroy the process groups when the block succeeds or ends by `sys.exit`, as Megatron's training loop may end.

    If the interpreter destroys them at exit, gloo's threads can outlive the memory that they use and abort the process
    after all work is done.
    """
    try:
        yield
    finally:
        if isinstance(sys.exception(), SystemExit | None) and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def check_output(path: str | None, args: Namespace) -> None:
    """Check that an output of a command that reads a model may be written, see `check_outputs`.

    Args:
        path: the output, or None if there is none.
        args: Megatron's arguments, with `--force`.

    Raises:
        UserError: the output is an input, exists without `--force`, or cannot be written.
    """
    if path is not None:
        names = ("load", "routing_mask", "tokenizer_model", "token_frequency", "eval_texts", "prompts_file")
        inputs = [Path(value) for name in names if (value := getattr(args, name, None)) is not None]
        check_outputs([path], [*inputs, *(files_of_data_path(args.data_path) if args.data_path else ())], args.force)


def write_on_first_rank(path: str | None, text: str) -> None:
    """Write a text file on the first rank, if a path is given."""
    if path is not None and torch.distributed.get_rank() == 0:
        with atomic_output(path) as unfinished:
            unfinished.write_text(text)
