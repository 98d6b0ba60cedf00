"""Turns the command line into the checked settings of a run, before any process group exists."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import cast

import torch
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training.argument_utils import gpt_config_from_args, hybrid_config_from_args

from maskmoe.errors import UserError, reason_of
from maskmoe.files.run_folder import run_folder
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.model_builder import MaskMoEModelConfig, StageBuilder
from maskmoe.training.resume.choose_checkpoint import checkpoint_to_load, lacks_what_it_loads


@dataclass(frozen=True)
class RunSettings:
    """The settings of a checked run, made once before any process group exists.

    Attributes:
        args: Megatron's validated arguments, which Megatron's own code reads and completes.
        has_work: Whether to train, or to save the checkpoint of a complete run into `--save`, which lacks it.
        run_folder: The folder of logs, arguments and pages; None if the run writes none.
        checkpoint_folders: The folders that the run saves checkpoints to, and no other run may.
    """

    args: Namespace
    mask: RoutingMask | None
    has_work: bool
    run_folder: Path | None
    checkpoint_folders: tuple[Path, ...]

    @classmethod
    def from_args(cls, args: Namespace, mask: RoutingMask | None, is_complete: bool) -> "RunSettings":
        """Return the settings of a run; it is complete if its checkpoint has reached the last iteration."""
        folders = () if args.save is None else (args.save, args.non_persistent_global_ckpt_dir)
        return cls(
            args,
            mask,
            has_work=not is_complete or lacks_what_it_loads(args),
            run_folder=run_folder(args.save, args.tensorboard_dir),
            checkpoint_folders=tuple(Path(folder) for folder in folders if folder is not None),
        )


@contextmanager
def megatrons_checks(what: str = "invalid settings") -> Iterator[None]:
    """Turn any error or exit of Megatron's code into a `UserError`, one line that begins with `what`.

    Assertions without a message, and exceptions that are no checks, are quoted with their source line.
    """
    try:
        yield
    except UserError:
        raise
    except SystemExit as end:
        raise UserError(f"{what}: Megatron ends without an error") from end
    except Exception as error:
        reason = reason_of(error)
        if isinstance(error, ArithmeticError | LookupError | TypeError | AttributeError):
            reason = f"{type(error).__name__} {reason} in Megatron's line {extract_tb(error.__traceback__)[-1].line!r}"
        raise UserError(f"{what}: {reason}") from error


def model_config_from_args(args: Namespace, builder: type[StageBuilder] | None = None) -> MaskMoEModelConfig:
    """Return the configuration of the command line's model; raise `UserError` if settings cannot work together."""
    with megatrons_checks():
        from_args = gpt_config_from_args if args.hybrid_layer_pattern is None else hybrid_config_from_args
        config = MaskMoEModelConfig(
            megatron=from_args(args),
            builder=builder,
            aux_loss_tokens=args.moe_aux_loss_tokens,
            qk_layernorm_all_heads=args.qk_layernorm_all_heads,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
        )
        # Megatron has no such setting for the arguments, and its GPT model refuses CUDA graphs without it.
        config.transformer.use_te_rng_tracker = args.te_rng_tracker
    if args.num_experts:
        # `find_routing_mask` refuses a run without a mask.
        checkpoint = checkpoint_to_load(args)
        config.routing_mask = Path(cast(Path, args.routing_mask or checkpoint))
        config.replaced_routing_mask = checkpoint if args.change_routing_mask else None
    return config


def embedding_ranks_of(config: MaskMoEModelConfig) -> Callable[[list[int]], list[int]]:
    """Return a function from the ranks of a pipeline to those ranks that have a copy of the embedding.

    These ranks are the first, the last if embedding and output layer share their weights, and all ranks with layers of
    multi-token prediction. The function is that of `pretrain_gpt.py` of Megatron-LM; by default, Megatron-Core takes
    the first and the last rank.
    """

    def embedding_ranks(ranks: list[int]) -> list[int]:
        found = {ranks[0]}
        if config.megatron.share_embeddings_and_output_weights:
            found.add(ranks[-1])
        if config.transformer.mtp_num_layers:
            found.update(get_mtp_ranks(ranks, config.transformer))
        return sorted(found)

    return embedding_ranks


@contextmanager
def leaving_process_groups() -> Iterator[None]:
    """Destroy the process groups when the block succeeds or ends by `sys.exit`, as Megatron's training loop may end.

    At exit, gloo's threads could outlive the memory that they use and abort the process after all work is done.
    """
    try:
        yield
    finally:
        if isinstance(sys.exception(), SystemExit | None) and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
