"""Turns the command line into a checked configuration, before any process group exists."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import cast

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.training.argument_utils import (
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import validate_args
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer

from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.globals import set_globals_without_writers
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.routing_mask.frequency import files_of_data_path
from maskmoe.training.loop.model_builder import MaskMoEGPTModelConfig, MaskMoEHybridModelConfig, MaskMoEModelConfig
from maskmoe.training.loop.rank_store import RankStore, check_launched
from maskmoe.training.resume import choose_checkpoint as resume
from maskmoe.training.settings.arguments import may_change_mask
from maskmoe.training.settings.megatron_errors import megatrons_checks
from maskmoe.training.settings.run_checks import ArgumentsProvider, RunChecks
from maskmoe.training.settings.run_settings import RunSettings
from maskmoe.training.watch.console import console
from maskmoe.training.watch.writers import wandb_defaults


class _ChecksOfRank(RunChecks):
    """The checks that each rank of a run makes of itself; the ranks verify the content of checkpoints together."""

    def __init__(self, own_arguments: ArgumentsProvider, reads_data: bool) -> None:
        packages = None if cpu.is_installed() else GpuPackages.installed()
        super().__init__(own_arguments, packages)
        self._reads_data = reads_data
        self._ranks = RankStore.from_environment()

    def find_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that all ranks find sound."""
        return resume.find_checkpoint(self.args, self._ranks)

    def check_pretrained_model(self) -> None:
        """Check the checkpoint in `--pretrained-checkpoint`, together with all other ranks."""
        resume.check_pretrained_model(self.args, self.checkpoint, self._ranks)

    def validate(self) -> Namespace:
        """Let Megatron validate the arguments, and set its global variables, the tokenizer included."""
        args = self.args
        vars(args).update(wandb_defaults(args))
        with megatrons_checks():
            validate_args(args)
            set_globals_without_writers(args)
        return args

    def most_bytes_read(self) -> float | None:
        """Return the size of datasets whose token ids are read; the first rank of each node reads all of them."""
        if not self._reads_data:
            return None
        return inf if os.environ.get("LOCAL_RANK", "0") == "0" else 0


def parse_and_check_args(
    own_arguments: ArgumentsProvider = lambda parser: parser, reads_data: bool = True
) -> RunSettings:
    """Parse the command line, check all settings and files in it, and set Megatron's global variables.

    The function changes no file and makes none, and does not open Megatron's writers.

    Args:
        own_arguments: Adds the arguments of one entry point to the arguments of all entry points.
        reads_data: Whether the entry point needs a dataset.

    Raises:
        UserError: The first error of the run.
    """
    console.load("checking settings and files")
    checks = _ChecksOfRank(own_arguments, reads_data)
    for error in checks.errors():
        raise UserError(error)
    for note in checks.notes:
        console.say(f"note: {note}")
    return RunSettings.from_args(checks.args, checks.mask, checks.is_complete)


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
        names = ("load", "routing_mask", "tokenizer_model", "token_frequency", "prompts_file")
        inputs = [Path(value) for name in names if (value := getattr(args, name, None)) is not None]
        check_outputs([path], [*inputs, *(files_of_data_path(args.data_path) if args.data_path else ())], args.force)


def write_on_first_rank(path: str | None, text: str) -> None:
    """Write a text file on the first rank, if a path is given."""
    if path is not None and torch.distributed.get_rank() == 0:
        with atomic_output(path) as unfinished:
            unfinished.write_text(text)
