"""From the command line to a checked configuration, before any process group exists."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import parse_and_validate_args, parse_args

from maskmoe.checkpoint.routing_mask import has_checkpoint, read_routing_mask
from maskmoe.errors import UserError
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.arguments import add_maskmoe_arguments
from maskmoe.training.checks import check_data, check_mask, check_supported, check_tokenizer
from maskmoe.training.model_builder import MaskMoEGPTModelConfig
from maskmoe.transformer.visible_experts import check_same_mask


def parse_and_check_args() -> Namespace:
    """Parse the command line, check all that it names, and set Megatron's global variables.

    Raises:
        UserError: settings that cannot work together, or a file that is missing, damaged or does not fit.
    """
    args = parse_args(add_maskmoe_arguments)
    check_supported(args)
    check_tokenizer(args)
    mask = find_routing_mask(args)
    try:
        args = parse_and_validate_args(add_maskmoe_arguments)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"invalid settings: {error}") from error
    check_mask(args, mask)
    check_data(args, mask)
    return args


def find_routing_mask(args: Namespace) -> RoutingMask:
    """The routing mask of the run: `--routing-mask`, else that of the checkpoint in `--load`.

    Raises:
        UserError: there is neither, or they differ.
    """
    resumes = args.load is not None and has_checkpoint(args.load)
    if args.routing_mask is None and not resumes:
        raise UserError(
            "no routing mask: pass --routing-mask FILE, made by tools/build_routing_mask.py, or --load a checkpoint"
        )
    mask = read_routing_mask(args.routing_mask or args.load)
    if args.routing_mask is not None and resumes:
        check_same_mask(mask.digest, read_routing_mask(args.load).digest)
    return mask


def model_config_from_args(args: Namespace) -> MaskMoEGPTModelConfig:
    """The configuration of the model that the command line describes."""
    config = gpt_config_from_args(args, model_config_cls=MaskMoEGPTModelConfig)
    config.routing_mask = Path(args.routing_mask or args.load)
    config.aux_loss_tokens = args.moe_aux_loss_tokens
    return config


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
