"""The commands on the documentation's pages have valid syntax, existing files and flags that their programs know."""

import argparse
import os
import re
import subprocess
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments
from support.documentation import (
    DOCS,
    FLAG,
    Block,
    bash_blocks,
    commands,
    documented_flags,
    flags_of,
    pages,
    prose,
    run_script,
)
from support.paths import ROOT

from maskmoe.training.inference.arguments import add_evaluation_arguments
from maskmoe.training.settings.arguments import add_maskmoe_arguments, add_pretraining_arguments

BLOCKS = [block for page in pages() for block in bash_blocks(page)]
# Subcommands that take Megatron's flags, too.
TAKE_MEGATRON_FLAGS = ("pretrain", "evaluate", "check")
# Scripts that run a subcommand.
SCRIPTS_OF_SUBCOMMANDS = {
    "launch/pretrain.sh": "pretrain",
    "launch/compare.sh": "compare",
}
# Flags of programs from elsewhere that the pages name.
FOREIGN_FLAGS = {
    "accelerate": {"--use_fsdp", "--fsdp_version", "--fsdp_cpu_ram_efficient_loading"},
    "lm_eval": {"--model", "--model_args", "--tasks", "--batch_size"},
    "mkdocs": {"--strict"},
    "zstd": {"--long"},
    "sbatch": {"--array", "--clusters", "--dependency", "--exclusive", "--gpus-per-node", "--nodes", "--time"},
    "torchrun": {"--max-restarts", "--nnodes", "--nproc-per-node", "--shutdown-timeout", "--standalone"},
    "pip": {"--no-deps", "--require-hashes"},
    "curl": {"--data", "--header", "--silent"},
    "vllm": {
        "--dtype",
        "--enable-expert-parallel",
        "--enable-prompt-embeds",
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "--load-format",
        "--max-model-len",
        "--model-class-overrides",
        "--pipeline-parallel-size",
        "--served-model-name",
        "--tensor-parallel-size",
        "--trust-remote-code",
    },
}
# Scripts that pages print.
PRINTED_SCRIPTS = {"my_pretrain.py", "my_loop.py", "my_layer.py", "fine_tune.py"}
SHELL_COMMANDS = {"cp", "export", "mkdir", "source", "split"}
# The first blocks of these pages, which take seconds (that of hybrid.md trains), and what they print.
QUICK = {
    "method.md": "digest           aeff2031e4989abe",
    "check.md": "no errors found",
    "launching.md": "-m maskmoe.launch.rank",
    "spikes.md": "--spike-deviations 20",
    "hybrid.md": "complete: 20 iterations, loss ",
    "slurm.md": "sbatch --output=",
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


@cache
def flags_in(*files: str) -> frozenset[str]:
    """Return all flags that occur in the text of some files."""
    return frozenset(flag for file in files for flag in FLAG.findall((ROOT / file).read_text(encoding="utf-8")))


@cache
def script_flags() -> frozenset[str]:
    return flags_in(*(str(path.relative_to(ROOT)) for path in (ROOT / "tools").glob("*/*.py")))


def unknown_flags(words: list[str]) -> set[str]:
    """Return the flags of a command that its program does not know.

    Raises:
        AssertionError: the program or one of its files does not exist.
    """
    if words[0] == "bash":
        words = words[1:]
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if program in SHELL_COMMANDS or words[:2] == ["python", "-c"]:
        return set()
    if program == "maskmoe":
        names = (" ".join(arguments[:2]), arguments[0])
        name = next((name for name in names if name in documented_flags()), "--help")
        assert name in names, arguments[0]
        return flags_of(arguments) - (known_flags(name) if name != "--help" else {"--help"})
    modules = [word for word in arguments if word.startswith("maskmoe.training.")]
    if program in ("torchrun", "python") and modules:
        assert (ROOT / f"{modules[0].replace('.', '/')}.py").is_file()
        return flags_of(arguments) - FOREIGN_FLAGS["torchrun"] - known_flags("pretrain")
    if program in FOREIGN_FLAGS:
        scripts = [word for word in arguments if word.endswith(".py")]
        if PRINTED_SCRIPTS.issuperset(scripts):
            return flags_of(arguments) - FOREIGN_FLAGS[program] - (known_flags("pretrain") if scripts else set())
        assert all((ROOT / script).is_file() for script in scripts)
        return flags_of(arguments) - FOREIGN_FLAGS[program] - script_flags()
    if program == "python":
        assert arguments[0] in PRINTED_SCRIPTS or (ROOT / arguments[0]).is_file(), arguments[0]
        return flags_of(arguments) - script_flags()

    assert os.access(ROOT / program, os.X_OK), f"{program} is not a script of the repository"
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if program == "launch/slurm/submit.sh":
        run_flags = flags_of(arguments[len(own) :]) - known_flags("pretrain")
        scripts = flags_in("launch/slurm/submit.sh", "launch/slurm/pretrain.sbatch")
        return run_flags | flags_of(own) - scripts - FOREIGN_FLAGS["sbatch"]
    if program == "launch/docker.sh":
        # The first word that is neither an option nor a path to mount begins the command inside the container.
        start = next((i for i, word in enumerate(own) if word.endswith(".sh")), len(own))
        inner = unknown_flags(own[start:]) if start < len(own) else set()
        return inner | (flags_of(own[:start]) - flags_in(program))
    if program in SCRIPTS_OF_SUBCOMMANDS:
        subcommand = SCRIPTS_OF_SUBCOMMANDS[program]
        return flags_of(own) - known_flags(subcommand)
    return flags_of(own) - flags_in(program)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_syntax_flags_and_files(block: Block) -> None:
    result = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in commands(block):
        assert unknown_flags(words) == set(), " ".join(words)
    named = re.findall(r"(?<![\w/.-])(?:launch|tools|tests|docker)/[\w./-]+", block.text)
    assert [file for file in named if not (ROOT / file).exists()] == []


# The changelog names flags that are gone.
@pytest.mark.parametrize(
    "page", sorted(set(pages()) - {ROOT / "CHANGELOG.md"}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_flags_in_text_exist(page: Path) -> None:
    known = megatron_flags() | script_flags() | flags_in("tests/run.sh", "tools/gpu_campaign.sh")
    known |= {flag for flags in documented_flags().values() for flag in flags}
    known |= {flag for flags in FOREIGN_FLAGS.values() for flag in flags}
    known |= {"--help-all"}  # which is added to Megatron's parser
    known |= flags_in(*(str(path.relative_to(ROOT)) for path in (ROOT / "launch").rglob("*.s*") if path.is_file()))
    assert set(FLAG.findall(prose(page))) - known == set()


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


def test_pages_can_be_followed_in_one_folder() -> None:
    """Commands refuse to replace a file unless `--force` is given."""
    written = [words for block in BLOCKS for words in commands(block) if "--force" not in words]
    outputs = [file for words in written for flag, file in pairwise(words) if flag == "--output"]
    assert sorted(outputs) == sorted(set(outputs))


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
