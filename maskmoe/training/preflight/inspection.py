"""Inspects the command line and the files of a run before it starts: finds all errors, and measures the run."""

import io
import json
import logging
import os
import sys
import warnings
from argparse import Namespace
from contextlib import redirect_stdout

import torch
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.core.transformer.moe.moe_layer import HAVE_TE
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch.distributed import HashStore

from maskmoe.arguments.parser import OneLineParser
from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import UserError, megatrons_checks
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import write_text
from maskmoe.megatron_compat import cpu
from maskmoe.megatron_compat.gpu import GpuPackages
from maskmoe.processes.run_tool import EXIT_BAD_INPUT
from maskmoe.routing_mask.mask import RoutingMask
from maskmoe.training.model.model_builder import MaskMoEModelConfig, model_config_from_args
from maskmoe.training.preflight.arguments import add_check_arguments
from maskmoe.training.preflight.layout import Layout
from maskmoe.training.preflight.memory import compute_memory
from maskmoe.training.preflight.parameters import count_parameters
from maskmoe.training.preflight.report import Report, compute_cost
from maskmoe.training.ranks import Ranks
from maskmoe.training.run_checks import CommandLine, RunChecks
from maskmoe.training.settings.arguments import add_pretraining_arguments

_MOST_BYTES_READ = 1 << 30  # of a dataset: a larger one would take more than a few seconds
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
    errors: list[str] = []
    # Drop everything that Megatron prints, logs and warns of while it parses, validates and builds.
    logging.disable(logging.WARNING)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        try:
            return report_on(check_run(ranks, errors), errors)
        except UserError as error:
            return Report((str(error),))


def check_run(num_ranks: int, errors: list[str]) -> RunChecks:
    """Make all checks of a run with this process's command line, and add the errors of the run to a list.

    Args:
        num_ranks: The number of ranks of the run.
        errors: Gets a line for each error.

    Raises:
        UserError: The command line cannot be parsed.
    """
    # Without GPUs here, the run is on other machines, with all packages, unless it asks for gloo explicitly.
    requested = OneLineParser(add_help=False)
    requested.add_argument("--distributed-backend")
    is_elsewhere = cpu.is_installed() and requested.parse_known_args()[0].distributed_backend != "gloo"
    packages = GpuPackages() if is_elsewhere else None
    command_line = CommandLine.parse(lambda parser: add_check_arguments(add_pretraining_arguments(parser)), packages)
    command_line.args.world_size, command_line.args.rank = num_ranks, 0
    command_line.args.verify_checkpoint = False  # only a run reads the content of a checkpoint
    one_rank, packages = Ranks(HashStore(), 0, 1), packages or GpuPackages.installed()
    checks = RunChecks(command_line, one_rank, packages, errors.append, _MOST_BYTES_READ)
    checks.run()
    return checks


def report_on(checks: RunChecks, errors: list[str]) -> Report:
    """Compute the layout, parameters, memory and cost of a checked run as far as they are known."""
    args, notes, layout, model, memory, cost = checks.args, checks.notes, None, None, None, None
    if checks.is_validated:
        layout = Layout.from_args(args)
        notes += _assume_vocabulary(args, checks.mask)
        try:
            config = _model_config(args)
            # Build the model without memory.
            with megatrons_checks("the model cannot be made"):
                model = count_parameters(args, config, checks.mask)
            memory, cost = compute_memory(args, config.transformer, model), compute_cost(args, model.mean_experts)
        except UserError as error:
            # The machine of the run may have a package that this machine lacks.
            (notes if isinstance(error.__cause__, ImportError) else errors).append(str(error))
    if checks.mask is None and args.num_experts and model is not None:
        notes.append(
            f"without a routing mask, the report assumes that each token uses {args.moe_router_topk} experts "
            "(--moe-router-topk); a token with fewer visible experts uses fewer"
        )
    return Report(tuple(dict.fromkeys(errors)), tuple(dict.fromkeys(notes)), layout, model, memory, cost)


def _assume_vocabulary(args: Namespace, mask: RoutingMask | None) -> list[str]:
    """Set the padded vocabulary size if there is no tokenizer, and return a note."""
    if args.padded_vocab_size:
        return []
    size, source = _ASSUMED_VOCAB_SIZE, "pass --vocab-size N for another number"
    if args.vocab_size:
        size, source = args.vocab_size, "--vocab-size"
    elif mask is not None:
        size, source = mask.vocab_size, "the routing mask's"
    args.padded_vocab_size = vocab_size_with_padding(size, args, logging_enabled=False)
    return [f"without a tokenizer, the report assumes a vocabulary of {size:,} ids ({source})"]


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
