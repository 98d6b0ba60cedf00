"""The command `--check` of pretraining."""

import io
import json
import logging
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

from maskmoe.check.activations import ActivationModel
from maskmoe.check.expert_use import ExpertUse
from maskmoe.check.findings import Findings, find_problems, reporting_failure_of
from maskmoe.check.layout import Layout
from maskmoe.check.memory import not_modelled, stage_memory
from maskmoe.check.parameters import count_parameters, mask_bytes
from maskmoe.check.report import MemoryReport, ModelReport, Report
from maskmoe.check.text import report_lines
from maskmoe.cli import EXIT_BAD_INPUT
from maskmoe.errors import UserError
from maskmoe.training.arguments import add_check_argument
from maskmoe.training.setup import ArgumentsProvider, megatrons_checks


@dataclass(frozen=True)
class CheckRequest:
    """The check that a command line asks for.

    Attributes:
        ranks: the number of ranks of the run.
        as_json: print the report as JSON instead of text.
    """

    ranks: int
    as_json: bool

    @classmethod
    def from_command_line(cls) -> "CheckRequest | None":
        """Return the request on the command line of this process; None without `--check`.

        Raises:
            UserError: the number of ranks is below 1, or `--json` is given without `--check`.
        """
        parser = add_check_argument(ArgumentParser(add_help=False, allow_abbrev=False))
        arguments, _ = parser.parse_known_args()
        if arguments.check is None:
            if arguments.check_json:
                raise UserError("--json is the form of the report of --check: pass --check, too")
            return None
        if arguments.check < 1:
            raise UserError(f"--check {arguments.check}: a run has at least one rank")
        return cls(arguments.check, arguments.check_json)


def check_run(request: CheckRequest, extra_args_provider: ArgumentsProvider) -> None:
    """Print what a run with this command line would be and need; exit with code 2 if the run would be refused.

    The report goes to stdout. Each error also goes to stderr, as a line that begins with `error: `.

    Args:
        request: which check to make.
        extra_args_provider: adds the arguments of the entry point to the common arguments.
    """
    report = inspect_run(request.ranks, extra_args_provider)
    if request.as_json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        print(*report_lines(report), sep="\n")
    sys.stdout.flush()
    for error in report.errors:
        print(f"error: {error}", file=sys.stderr)
    if report.errors:
        sys.exit(EXIT_BAD_INPUT)


def inspect_run(ranks: int, extra_args_provider: ArgumentsProvider) -> Report:
    """Check a run with the command line of this process, and work out its layout, parameters and memory.

    Args:
        ranks: the number of ranks of the run.
        extra_args_provider: adds the arguments of the entry point to the common arguments.
    """
    with _silence():
        try:
            findings = find_problems(ranks, extra_args_provider)
        except UserError as error:
            return Report(errors=(str(error),))
        divides = not any(findings.layout.errors())
        layout = findings.layout if divides else None
        try:
            model, memory = _measure(findings, divides)
        except UserError as error:
            errors = dict.fromkeys([*findings.errors, str(error)])
            return Report(tuple(errors), findings.notes, layout)
    return Report(findings.errors, findings.notes, layout, model, memory)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop everything that Megatron prints, logs and warns of while it parses, validates and builds."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _measure(findings: Findings, divides: bool) -> tuple[ModelReport | None, MemoryReport | None]:
    """Count the parameters of the model, and compute the memory if the layout divides.

    Raises:
        UserError: the model cannot be built.
    """
    args, config, mask = findings.args, findings.config, findings.mask
    if args is None or config is None:
        return None, None
    # Megatron has validated the arguments with a layout that divides, so the model is known even if the layout of the
    # command line does not divide.
    layout = Layout.from_args(args)
    with reporting_failure_of("the model"), megatrons_checks():
        parameters = count_parameters(config, layout)
    use = ExpertUse.from_mask(mask, args.moe_router_topk if args.num_experts else 0)
    model = ModelReport(parameters, args.num_experts, use, mask is not None, args.padded_vocab_size)
    if not divides:
        return model, None
    activations = ActivationModel.from_args(args, config.transformer, layout, use.mean)
    bytes_of_mask = mask_bytes(config, mask) if mask is not None else 0
    stages = stage_memory(args, layout, parameters, activations, bytes_of_mask)
    return model, MemoryReport(stages, activations.experts_per_token, tuple(not_modelled(args)))
