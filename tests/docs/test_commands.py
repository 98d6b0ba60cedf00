"""The commands on the documentation's pages have valid syntax, existing files and flags that their programs know."""

import argparse
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from support.documentation import DOCS, Block, bash_blocks, commands, pages, run_script
from support.paths import ROOT

from maskmoe.training.evaluation.arguments import add_evaluation_arguments
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments

FLAG = re.compile(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*")


def flags_of(words: list[str]) -> set[str]:
    """Return the flags among the words of a command, without their values."""
    return {word.partition("=")[0] for word in words if FLAG.match(word)}


@cache
def documented_flags() -> dict[str, set[str]]:
    """Return the flags of each subcommand, as the page of flags lists them, which the build of the site makes."""
    flags: dict[str, set[str]] = {}
    with tempfile.NamedTemporaryFile(suffix=".md") as page:
        subprocess.run([sys.executable, str(DOCS / "generators" / "flags.py"), page.name], check=True)
        text = Path(page.name).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("## "):
            section = flags.setdefault(line.removeprefix("## "), {"--help"})
        elif line.startswith("| `--"):
            section |= set(FLAG.findall(line.split("|")[1]))
    return flags


BLOCKS = [block for page in pages() for block in bash_blocks(page)]
# Subcommands that take Megatron's flags, too.
TAKE_MEGATRON_FLAGS = ("pretrain", "evaluate", "check")
# Scripts that run a subcommand.
SCRIPTS = {"launch/pretrain.sh": "pretrain", "launch/compare.sh": "compare"}
# The first blocks of these pages, which take seconds (that of hybrid.md trains), and what they print.
QUICK = {
    "method.md": "digest           aeff2031e4989abe",
    "check.md": "no errors found",
    "launching.md": "-m maskmoe.launch.rank",
    "hybrid.md": "complete: 20 iterations, loss ",
    "containers.md": "podman run --rm",
    "comparing.md": "hash-balanced",
}


@cache
def megatron_flags() -> frozenset[str]:
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return frozenset(parser._option_string_actions)


@cache
def known_flags(subcommand: str) -> frozenset[str]:
    flags = frozenset(documented_flags()[subcommand])
    if subcommand == "check":
        flags |= documented_flags()["pretrain"]
    return flags | megatron_flags() if subcommand in TAKE_MEGATRON_FLAGS else flags


def unknown_flags(words: list[str]) -> set[str]:
    """Return the flags of a subcommand's command that the subcommand does not know; no flags of other programs."""
    program, *arguments = words[1:] if words[0] == "bash" else words
    program = program.removeprefix(".venv/bin/")
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if program == "maskmoe":
        return flags_of(arguments) - ({"--help"} if arguments[0] == "--help" else known_flags(arguments[0]))
    if program in SCRIPTS:
        return flags_of(own) - known_flags(SCRIPTS[program])
    if program.startswith(("launch/", "tests/", "tools/")):
        if program.startswith("launch/slurm/"):
            assert flags_of(arguments[len(own) :]) <= known_flags("pretrain")
            return set()  # Options before `--` are sbatch's.
        script = (ROOT / program).read_text(encoding="utf-8")
        own = own[: next((index for index, word in enumerate(own) if word.endswith(".sh")), len(own))]
        if program != "tools/gpu_campaign.sh":
            return flags_of(own) - set(FLAG.findall(script))
    return set()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_syntax_flags_and_files(block: Block) -> None:
    result = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in commands(block):
        assert unknown_flags(words) == set(), " ".join(words)
    named = re.findall(r"(?<![\w/.-])(?:launch|tools|tests|docker)/[\w./-]+", block.text)
    assert [file for file in named if not (ROOT / file).exists()] == []


def test_page_lists_all_defaults_that_differ_from_megatrons() -> None:
    page = (DOCS / "megatron.md").read_text(encoding="utf-8")
    listed = set(FLAG.findall(page.partition("## Defaults that differ")[2]))
    stock = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    for add_arguments in (add_pretraining_arguments, add_evaluation_arguments):
        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        add_arguments(add_maskmoe_arguments(parser))
        changed = [flag for flag in stock._actions if parser.get_default(flag.dest) != stock.get_default(flag.dest)]
        names = {flag.option_strings[0] for flag in changed}
        assert {name for name in names - listed if not name.endswith("-fusion")} == set()


@pytest.mark.parametrize(
    ("page", "output"),
    [
        pytest.param(page, output, marks=[pytest.mark.slow] if page == "hybrid.md" else [], id=page)
        for page, output in QUICK.items()
    ],
)
def test_first_command_of_page_runs(page: str, output: str, tmp_path: Path) -> None:
    script = bash_blocks(DOCS / page)[0].text.replace("launch/", f"{ROOT}/launch/")
    result = run_script(script, tmp_path, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert output in result.stdout


def test_all_commands_of_the_page_about_data_run(tmp_path: Path) -> None:
    """The commands use the files of the commands before them. Slurm's script is left out."""
    (tmp_path / "books.txt").write_text("One book.\n\n\nAnother book.\n")
    blocks = [block.text for block in bash_blocks(DOCS / "data.md") if "#SBATCH" not in block.text]
    result = run_script("\n".join(blocks), tmp_path, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    sizes = dict(re.findall(r"^data/(\w+)_text_document: (.*), ", result.stdout, re.MULTILINE))
    assert sizes["whole"] == sizes["web"]
