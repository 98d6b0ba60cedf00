"""Megatron models that are built from a converted checkpoint as a user's run builds them."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import checkpointing
from megatron.training.arguments import parse_args, validate_args

from maskmoe.checkpoint.series import RELEASE, write_tracker
from maskmoe.training.model.model_builder import model_config_from_args
from maskmoe.training.resume.model_settings import settings_of_checkpoint
from maskmoe.training.settings.arguments import add_maskmoe_arguments

TRAINING = "--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-3"
"""Flags without which Megatron accepts no others."""

ON_ONE_RANK = Namespace(pipeline_model_parallel_size=1, skip_train=False)
"""Megatron's arguments that decide where a checkpoint's pattern is divided."""


def load_converted_model(load: Path, flags: list[str]) -> tuple[torch.nn.Module, Namespace]:
    """Load a model with the flags of a user; return the model and Megatron's arguments.

    Args:
        load: Folder of the checkpoint `release`.
        flags: The flags that the conversion returned, and further flags of Megatron.
    """
    words = f"pretrain --load {load} --use-checkpoint-args {' '.join(flags)} {TRAINING} --data-path none".split()

    def add_arguments(parser: ArgumentParser) -> ArgumentParser:
        parser = add_maskmoe_arguments(parser)
        parser.set_defaults(**settings_of_checkpoint(ON_ONE_RANK, load / "release"))
        return parser

    with mock.patch.object(sys, "argv", words):
        args, _ = checkpointing.load_args_from_checkpoint(parse_args(add_arguments))
        args = validate_args(args)
    model = build_model(args)
    state, *_ = checkpointing._load_base_checkpoint(
        str(load), args, sharded_state_dict={"model": model.sharded_state_dict()}
    )
    model.load_state_dict(state["model"])
    return model.eval(), args


def build_model(args: Namespace) -> torch.nn.Module:
    """Build the model of a run with these arguments of Megatron."""
    config = model_config_from_args(args)
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def save_as_release(model: torch.nn.Module, args: Namespace, folder: Path) -> None:
    """Save a model as the checkpoint `release` in a folder, which `load_converted_model` loads."""
    (folder / RELEASE).mkdir(parents=True)
    state = {"args": args, "iteration": 0, "model": model.sharded_state_dict()}
    dist_checkpointing.save(state, str(folder / RELEASE))
    write_tracker(folder, RELEASE)


def logits_of_megatron(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Compute logits, float32 [batch, length, padded vocabulary], of ids, int64 [batch, length]."""
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
