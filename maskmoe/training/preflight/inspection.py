"""Inspects the command line and the files of a run before it starts: finds all errors, and measures the run."""

import io
import json
import logging
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from copy import deepcopy
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import (
    init_num_microbatches_calculator,
    unset_num_microbatches_calculator,
)
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import validate_args
from megatron.training.global_vars import rebuild_tokenizer

from maskmoe.arguments.parser import OneLineParser
from maskmoe.checkpoint.series import choose_checkpoint
from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.files.outputs import check_outputs, write_text
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.processes.run_tool import EXIT_BAD_INPUT
from maskmoe.training.model.model_builder import MaskMoEModelConfig, model_config_from_args
from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.memory import compute_memory
from maskmoe.training.preflight.parameters import count_parameters
from maskmoe.training.preflight.report import Report, compute_cost
from maskmoe.training.resume.choose_checkpoint import loads_what_it_saves
from maskmoe.training.run_checks import RunChecks
from maskmoe.training.settings.arguments import add_check_arguments, add_pretraining_arguments

# The number of ids that the report assumes if neither a tokenizer nor a flag nor a mask says it.
_ASSUMED_VOCAB_SIZE = 32_000
# The machine of the check may lack Transformer Engine, and Megatron then refuses the settings that are replaced here.
# None of them changes the shape of a parameter.
_WITHOUT_TRANSFORMER_ENGINE = {
    "gradient_accumulation_fusion": False,  # kernels of Apex, which this machine lacks, too
    "moe_permute_fusion": False,
    "apply_rope_fusion": False,
    "use_precision_aware_optimizer": False,
    **dict.fromkeys(("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"), torch.float32),
    "fp8": None,
    "fp4": None,
}


def main() -> None:
    """Print what the run of this process's command line would be; exit with code 2 if the run would be refused.

    The report goes to stdout, and to the file in `--json`. Each error also goes to stderr, as a line that begins with
    `error: `.

    Raises:
        UserError: The number of ranks is not a number of at least 1, or is missing. Or the file in `--json` exists and
            `--force` is not given, or the command line names the file as an input, too.
    """
    request, run = add_check_arguments(OneLineParser(add_help=False)).parse_known_args()
    if request.check is None:
        raise UserError("pass --check with the number of ranks of the run")
    if request.check_json is not None:
        values = (word.partition("=")[2] if word.startswith("--") else word for word in run)
        inputs = (path for value in values for path in (value, *dataset_files(value)))  # files, or datasets
        check_outputs([request.check_json], filter(os.path.isfile, inputs), request.force)
    report = inspect_run(request.check)
    if request.check_json is not None:
        write_text(request.check_json, json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n")
    print(report.to_text(), flush=True)
    for error in report.errors:
        print(f"error: {error}", file=sys.stderr)
    if report.errors:
        sys.exit(EXIT_BAD_INPUT)


def inspect_run(ranks: int) -> Report:
    """Check a run with the command line of this process, and work out its layout, parameters and memory.

    Args:
        ranks: The number of ranks of the run.
    """
    # Drop everything that Megatron prints, logs and warns of while it parses, validates and builds.
    logging.disable(logging.WARNING)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            return Inspection(ranks).report()
        except UserError as error:
            return Report((str(error),))


class Inspection(RunChecks):
    """Makes the checks of a run alone, for ranks that are started elsewhere, and measures the run.

    Args:
        num_ranks: The number of ranks that the run would have.

    Raises:
        UserError: The command line of this process has unknown flags.
    """

    most_bytes_read = 1 << 30  # a larger dataset would take more than a few seconds

    def __init__(self, num_ranks: int) -> None:
        super().__init__(lambda parser: add_check_arguments(add_pretraining_arguments(parser)))
        if cpu.is_installed() and self.args.distributed_backend != "gloo":
            self.packages = GpuPackages()  # without GPUs here, the run is on other machines
        self.args.world_size, self.args.rank = num_ranks, 0

    def report(self) -> Report:
        """Make all checks, and compute the layout, parameters and memory as far as they are known."""
        errors = list(self.errors())
        args, layout, model, memory, cost = self.args, None, None, None, None
        if self.is_validated:
            layout = Layout.from_args(args)
            self._assume_vocabulary()
            try:
                config = _model_config(args)
                # Build the model without memory.
                with megatrons_checks("the model cannot be made"):
                    model = count_parameters(args, config, self.mask)
                memory, cost = compute_memory(args, config.transformer, model), compute_cost(args, model.mean_experts)
            except UserError as error:
                # The machine of the run may have a package that this machine lacks.
                (self.notes if isinstance(error.__cause__, ImportError) else errors).append(str(error))
        if self.mask is None and args.num_experts and model is not None:
            self.notes.append(
                f"without a routing mask, the report assumes that each token uses {args.moe_router_topk} experts "
                "(--moe-router-topk); a token with fewer visible experts uses fewer"
            )
        errors, notes = (tuple(dict.fromkeys(lines)) for lines in (errors, self.notes))
        return Report(errors, notes, layout, model, memory, cost)

    # ---- What differs from the checks of a rank ----------------------------------------------------------------------

    def add_arguments(self, parser: ArgumentParser) -> ArgumentParser:
        """Add all arguments, with the defaults on GPUs unless a run on CPUs asks for gloo explicitly."""
        on_gpus = {name: parser.get_default(name) for name in cpu.argument_defaults()}
        parser = super().add_arguments(parser)
        requested = OneLineParser(add_help=False)
        requested.add_argument("--distributed-backend")
        if cpu.is_installed() and requested.parse_known_args()[0].distributed_backend != "gloo":
            parser.set_defaults(**on_gpus | GpuPackages().argument_defaults())
        return parser

    def find_checkpoint(self, folder: str) -> Path | None:
        """Return the newest checkpoint in a folder whose structure is intact; only a run reads the content."""
        choice = choose_checkpoint(folder, self.args.ckpt_step)
        self.notes += [f"checkpoint {damage}" for damage in choice.rejected]
        if choice.checkpoint is None and loads_what_it_saves(self.args):
            self.notes.append(f"--load {folder} holds no checkpoint: training starts from the beginning")
        return choice.checkpoint

    def validate(self) -> Namespace:
        """Let Megatron validate a copy of the arguments."""
        args = deepcopy(self.args)
        with megatrons_checks():
            validate_args(args)
            try:
                init_num_microbatches_calculator(
                    rank=0,
                    global_batch_size=args.global_batch_size,
                    micro_batch_size=args.micro_batch_size,
                    data_parallel_size=args.data_parallel_size,
                    decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
                    step_batch_size_schedule=args.step_batch_size_schedule,
                    seq_length=args.seq_length,
                )
            finally:
                unset_num_microbatches_calculator()
        return args

    def make_tokenizer(self) -> None:
        """Build Megatron's tokenizer, also if Megatron has refused the arguments."""
        with megatrons_checks(f"the tokenizer ({self.args.tokenizer_type} {self.args.tokenizer_model}) cannot be made"):
            rebuild_tokenizer(self.args)

    # ---- What the run needs ------------------------------------------------------------------------------------------

    def _assume_vocabulary(self) -> None:
        """Set the padded vocabulary size if there is no tokenizer, and add a note."""
        args = self.args
        if args.padded_vocab_size:
            return
        size, source = _ASSUMED_VOCAB_SIZE, "pass --vocab-size N for another number"
        if args.vocab_size:
            size, source = args.vocab_size, "--vocab-size"
        elif self.mask is not None:
            size, source = self.mask.vocab_size, "the routing mask's"
        args.padded_vocab_size = vocab_size_with_padding(size, args, logging_enabled=False)
        self.notes.append(f"without a tokenizer, the report assumes a vocabulary of {size:,} ids ({source})")


def _model_config(args: Namespace) -> MaskMoEModelConfig:
    """Return the configuration of the model. Raises UserError if Megatron refuses it."""
    buildable = Namespace(**vars(args))
    buildable.routing_mask = args.routing_mask or args.load or "missing"
    buildable.spec = None  # `refusals` has reported it
    if not HAVE_TE:
        vars(buildable).update(_WITHOUT_TRANSFORMER_ENGINE)
    with megatrons_checks():
        config = model_config_from_args(buildable)
        pretrain_cfg_container_from_args(buildable, config)
        config.megatron.finalize()
    return config
