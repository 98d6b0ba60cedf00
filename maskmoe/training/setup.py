"""From the command line to a checked configuration, before any process group exists."""

import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from maskmoe.checkpoint.routing_mask import read_routing_mask
from maskmoe.checkpoint.series import iteration_of
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.arguments import add_maskmoe_arguments, refuse_unknown_flags
from maskmoe.training.file_checks import (
    check_data,
    check_mask,
    check_save_folder,
    check_tokenizer,
    tokenizer_sha256,
)
from maskmoe.training.model_builder import MaskMoEGPTModelConfig
from maskmoe.training.rank_store import RankStore
from maskmoe.training.refusals import check_supported
from maskmoe.training.resume import (
    check_same_model,
    checkpoint_to_load,
    find_checkpoint,
    further_checkpoint_args,
)
from maskmoe.transformer.visible_experts import check_same_mask

ArgumentsProvider = Callable[[ArgumentParser], ArgumentParser]


def parse_and_check_args(
    extra_args_provider: ArgumentsProvider | None = None, *, reads_data: Callable[[Namespace], bool] = lambda _: True
) -> Namespace:
    """Parse the command line, check all that it names, and set Megatron's global variables.

    Args:
        extra_args_provider: adds the arguments of one entry point to those of all.
        reads_data: whether the entry point, with these arguments, needs a dataset.

    Raises:
        UserError: settings that cannot work together, or a file that is missing, damaged or does not fit.
    """
    chosen = {}

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add_maskmoe_arguments(parser)
        parser = extra_args_provider(parser) if extra_args_provider else parser
        parser.set_defaults(**chosen)
        refuse_unknown_flags(parser, sys.argv[1:])
        return parser

    args = parse_args(add_arguments)
    checkpoint = find_checkpoint(args, RankStore.from_environment())
    if checkpoint is not None and (iteration := iteration_of(checkpoint)) is not None:
        # Megatron is told by `--ckpt-step`, as a user would tell it.
        args.ckpt_step = chosen["ckpt_step"] = iteration
    if args.use_checkpoint_args:
        if checkpoint is None:
            raise UserError("--use-checkpoint-args needs --load with the folder of the checkpoints")
        # As defaults, so that the command line wins.
        chosen |= further_checkpoint_args(checkpoint)
        args = parse_args(add_arguments)
        args, _ = load_args_from_checkpoint(args)
    check_supported(args)
    check_tokenizer(args)
    check_save_folder(args)
    mask = find_routing_mask(args, checkpoint)
    with megatrons_checks():
        args = parse_and_validate_args(add_arguments)
    args.tokenizer_sha256 = tokenizer_sha256(args)  # saved with the other arguments in every checkpoint
    if checkpoint is not None:
        check_same_model(args, checkpoint)
    if mask is not None:
        check_mask(args, mask)
    if reads_data(args):
        check_data(args, mask)
    return args


def find_routing_mask(args: Namespace, checkpoint: Path | None) -> RoutingMask | None:
    """The routing mask of the run: `--routing-mask`, else that of the checkpoint to load. None without experts.

    Raises:
        UserError: there is neither, or they differ.
    """
    if not args.num_experts:
        return None
    if args.routing_mask is None and checkpoint is None:
        raise UserError(
            "no routing mask: pass --routing-mask FILE, made by tools/build_routing_mask.py, or --load a checkpoint"
        )
    mask = read_routing_mask(args.routing_mask or checkpoint)
    if args.routing_mask is not None and checkpoint is not None:
        check_same_mask(mask.digest, read_routing_mask(checkpoint).digest)
    return mask


def load_model(args: Namespace) -> torch.nn.Module:
    """Initialise Megatron and build this rank's part of the model with the weights of the checkpoint in `--load`.

    Raises:
        UserError: there is no checkpoint, or the pipeline is interleaved, which only training profits from.
    """
    if checkpoint_to_load(args) is None:
        raise UserError("pass --load with the folder of the checkpoints")
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UserError("interleaved pipelines are for training; leave --num-layers-per-virtual-pipeline-stage out")
    initialize_megatron(store=RankStore.from_environment().for_process_groups)
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, model_config_from_args(args)),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model[0]


def model_config_from_args(args: Namespace) -> MaskMoEGPTModelConfig:
    """The configuration of the model that the command line describes.

    Raises:
        UserError: settings that cannot work together.
    """
    with megatrons_checks():
        config = gpt_config_from_args(args, model_config_cls=MaskMoEGPTModelConfig)
    if args.num_experts:
        config.routing_mask = Path(args.routing_mask or checkpoint_to_load(args))
    config.aux_loss_tokens = args.moe_aux_loss_tokens
    config.qk_layernorm_all_heads = args.qk_layernorm_all_heads
    config.rope_scaling_factor = args.rope_scaling_factor  # Megatron-Core 0.19 leaves it at its default
    return config


@contextmanager
def megatrons_checks() -> Iterator[None]:
    """What Megatron finds wrong with the settings, as a UserError; of an assertion without text, its condition."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError) as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"invalid settings: {' '.join(reason.split())}") from error


@contextmanager
def leaving_process_groups() -> Iterator[None]:
    """Destroy the process groups when the block ends well, or by `sys.exit` as Megatron's training loop may end.

    Left to the interpreter, gloo's threads can outlive what they work on and abort the process after all work is done.
    """
    try:
        yield
    except SystemExit:
        _leave_process_groups()
        raise
    _leave_process_groups()


def _leave_process_groups() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
