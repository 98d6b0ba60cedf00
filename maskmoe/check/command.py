"""The command `--check` of pretraining."""

import io
import logging
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from maskmoe.check.activations import ActivationModel
from maskmoe.check.findings import Findings, any_error_of, find_problems
from maskmoe.check.layout import Layout
from maskmoe.check.memory import not_modelled, stage_memory
from maskmoe.check.parameters import count_parameters, mask_bytes
from maskmoe.check.report import (
    describe_layers,
    describe_layout,
    describe_memory,
    describe_parameters,
    experts_per_token,
)
from maskmoe.cli import EXIT_BAD_INPUT
from maskmoe.errors import UserError
from maskmoe.training.arguments import add_check_argument
from maskmoe.training.setup import ArgumentsProvider, megatrons_checks


def ranks_to_check() -> int | None:
    """The number of ranks that `--check` on the command line asks about; None without it.

    Raises:
        UserError: it is not at least 1.
    """
    parser = add_check_argument(ArgumentParser(add_help=False, allow_abbrev=False))
    ranks = parser.parse_known_args()[0].check
    if ranks is not None and ranks < 1:
        raise UserError(f"--check {ranks}: a run has at least one rank")
    return ranks


def check_run(ranks: int, extra_args_provider: ArgumentsProvider) -> None:
    """Print what the run of this command line would be and need; then end with exit code 2 if it would be refused.

    Args:
        ranks: processes of the run.
        extra_args_provider: adds the arguments of its entry point to those of all.
    """
    lines: list[str] = []
    with _silence():
        findings = find_problems(ranks, extra_args_provider)
        errors = list(findings.errors)
        try:
            lines.extend(_describe(findings))
        except UserError as error:
            errors.append(str(error))
    for line in [*lines, *(f"note: {note}" for note in findings.notes)]:
        print(line)
    if not errors:
        print("no errors found")
        return
    sys.stdout.flush()
    for error in dict.fromkeys(errors):
        print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what Megatron prints, logs and warns of while it parses, validates and builds."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _describe(findings: Findings) -> Iterator[str]:
    divides = not any(findings.layout.errors())
    if divides:
        yield from describe_layout(findings.layout)
    args, config, mask = findings.args, findings.config, findings.mask
    if args is None or config is None:
        return
    # A layout that does not divide still has a model.
    layout = Layout.from_args(args)
    with any_error_of("the model"), megatrons_checks():
        model = count_parameters(config, layout)
    yield from describe_layers(model)
    yield from describe_parameters(model, args.num_experts, args.moe_router_topk, mask)
    if not divides:
        return
    topk = args.moe_router_topk if args.num_experts else 0
    mean_experts = experts_per_token(mask, topk) if mask is not None else topk
    activations = ActivationModel.from_args(args, config.transformer, layout, mean_experts)
    bytes_of_mask = mask_bytes(config, mask) if mask is not None else 0
    memory = stage_memory(args, layout, model, activations, bytes_of_mask)
    yield from describe_memory(layout, memory, activations, model)
    yield from (f"  Note: {line}." for line in not_modelled(args))
