"""Loads the model of a checkpoint for evaluation."""

from argparse import Namespace

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from maskmoe.checkpoint.series import describe_missing
from maskmoe.errors import UserError
from maskmoe.megatron_compat.checkpoint_patches import load_only
from maskmoe.processes.console import console
from maskmoe.training.model.model_builder import StageBuilder, embedding_ranks_of, model_config_from_args
from maskmoe.training.ranks import meet_ranks
from maskmoe.training.resume.find_checkpoint import checkpoint_to_load


def load_model(args: Namespace, builder: type[StageBuilder] | None = None) -> torch.nn.Module:
    """Initialise Megatron and return this rank's part of the model, with the weights of the checkpoint in `--load`.

    Megatron's writers stay closed, since only training logs to them. `builder` replaces the builder of the model.

    Raises:
        UserError: `--load` holds no checkpoint, the pipeline is interleaved, which is for training only, or no launcher
            has started this rank.
    """
    checkpoint = checkpoint_to_load(args)
    if checkpoint is None:
        found = "" if args.load is None else f"; --load {describe_missing(args.load)}"
        raise UserError(f"pass --load with the folder of the checkpoints{found}")
    if args.virtual_pipeline_model_parallel_size is not None:
        raise UserError(
            "interleaved pipelines are for training only; leave --num-layers-per-virtual-pipeline-stage out, or give "
            "--hybrid-layer-pattern as many stages as --pipeline-model-parallel-size"
        )
    console.load(f"building the model and reading {checkpoint}")
    ranks = meet_ranks(args)
    ranks.gather("checks", "passed")
    config = model_config_from_args(args, builder)
    initialize_megatron(get_embedding_ranks=embedding_ranks_of(config), store=ranks.store)
    load_only(checkpoint, args)
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    return model[0]
