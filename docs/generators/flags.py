"""Write the page of flags: the flags of every subcommand, read from the subcommands' own parsers.

python docs/generators/flags.py OUTPUT

The text around the tables is in flags.md.j2.
"""

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import pages

from maskmoe.command_line.main import SUBCOMMANDS
from maskmoe.megatron_compat import prepare_process

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

# `maskmoe evaluate` reads this flag before Megatron's parser reads the others.
PROCESSES = (
    "`--nproc-per-node N`",
    "start N ranks on this machine. Default: one rank for each GPU, or one without GPUs",
)


class ParserFound(Exception):  # noqa: N818 - it carries a result and is not an error
    """Carries the parser of a subcommand out of its `main`."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def render() -> str:
    """Return the page."""
    return pages.fill("flags.md.j2", sections="\n\n".join(map(section, SUBCOMMANDS)))


def section(subcommand: str) -> str:
    """Return the section of one subcommand: its purpose and the tables of its flags."""
    parts = [f"## {subcommand}", f"`maskmoe {subcommand}`: {SUBCOMMANDS[subcommand][1]}."]
    providers = megatron_providers().get(subcommand)
    if providers is not None:
        parser = argparse.ArgumentParser(add_help=False)
        for provider in providers:
            provider(parser)
        if subcommand == "pretrain":
            parts += ["Options before the model file:", flag_table(parser_of(subcommand)), "Flags after it:"]
        parts.append(flag_table(parser, first_rows=[PROCESSES] if subcommand == "evaluate" else []))
    else:
        parser = parser_of(subcommand)
        branches = subparsers(parser)
        if not branches:
            parts.append(flag_table(parser))
        for name, branch in branches.items():
            parts += [f"### {subcommand} {name}", flag_table(branch)]
    return "\n\n".join(parts)


def megatron_providers() -> dict[str, tuple[Provider, ...]]:
    """Return the functions that add MaskMoE's flags to Megatron's parser, by subcommand."""
    from maskmoe.training.evaluation.arguments import add_evaluation_arguments
    from maskmoe.training.preflight.arguments import add_check_arguments
    from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments

    return {
        "pretrain": (add_maskmoe_arguments, add_pretraining_arguments, add_check_arguments),
        "evaluate": (add_maskmoe_arguments, add_evaluation_arguments),
    }


def parser_of(subcommand: str) -> argparse.ArgumentParser:
    """Return the parser that a subcommand's `main` builds.

    Raises:
        LookupError: `main` parses no arguments.
    """

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise ParserFound(parser)

    module = importlib.import_module(f"maskmoe.{SUBCOMMANDS[subcommand][0]}")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        mock.patch.object(sys, "argv", [f"maskmoe {subcommand}"]),
    ):
        try:
            module.main()
        except ParserFound as found:
            return found.parser
    raise LookupError(f"maskmoe {subcommand} parses no arguments")


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of a parser's own subcommands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def flag_table(parser: argparse.ArgumentParser, first_rows: Sequence[tuple[str, str]] = ()) -> str:
    """Return a table of a parser's arguments, in the order of its `--help`."""
    return pages.table(("flag", "meaning"), [*first_rows, *rows(parser)])


def rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the name with its values, and the meaning, of each argument of a parser."""
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
                yield f"`{invocation(action, formatter)}`".replace("|", "\\|"), pages.cell(meaning(action, formatter))


def invocation(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    """Return how an argument is written on the command line, such as `--topk K [K ...]`."""
    if action.nargs == argparse.REMAINDER:
        return str(action.metavar or action.dest).upper()
    if not action.option_strings:
        return formatter._format_args(action, formatter._get_default_metavar_for_positional(action))
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return flag
    return f"{flag} {formatter._format_args(action, formatter._get_default_metavar_for_optional(action))}"


def meaning(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    """Return an argument's help text, with its default value if the text does not name the default."""
    text = formatter._expand_help(action).replace(" (default: None)", "") if action.help else ""
    names_default = "default" in text or "[" in text
    if isinstance(action.default, str | int | float) and not isinstance(action.default, bool) and not names_default:
        return f"{text} (default: {action.default})".strip()
    return f"{text} (required)".strip() if action.required and action.option_strings else text


if __name__ == "__main__":
    prepare_process()
    pages.write(render)
