"""The program `maskmoe`: its help and its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.command_line.main import SUBCOMMANDS, dispatch
from maskmoe.errors import UserError


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "maskmoe", *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_help_names_each_subcommand_without_importing_torch(tmp_path):
    check = "import sys; from maskmoe.command_line.main import help_text; print(help_text())\n"
    check += "assert 'torch' not in sys.modules"
    output = subprocess.check_output([sys.executable, "-P", "-c", check], cwd=tmp_path, text=True)
    assert output == run("--help", cwd=tmp_path).stdout
    listed = [line.strip().partition("  ")[0] for line in output.splitlines() if line.startswith("  ")]
    assert listed == list(SUBCOMMANDS)


HELP_WITHOUT_LIBRARIES = """
import contextlib, io, sys
heavy = ("torch", "megatron", "transformers", "scipy", "matplotlib", "sentencepiece", "tokenizers")
sys.modules |= dict.fromkeys(heavy)  # importing them raises an ImportError
from maskmoe.command_line.main import dispatch
for name in sys.argv[1:]:
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        dispatch([*name.split(), "--help"])
    print(name if f"maskmoe {name} " in page.getvalue() else page.getvalue())
"""


def test_help_of_each_subcommand_needs_no_large_library():
    """tests/training/test_help.py tests the pages of the training commands."""
    training = ("pretrain", "evaluate")
    names = [name for name in SUBCOMMANDS if name not in training]
    command = [sys.executable, "-P", "-c", HELP_WITHOUT_LIBRARIES, *names]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert completed.stdout.splitlines() == names, completed.stderr


@pytest.mark.parametrize(("words", "error"), [(["pretain"], "unknown subcommand pretain"), ([], "missing subcommand")])
def test_bad_command_line_is_refused(words, error):
    with pytest.raises(UserError, match=error):
        dispatch(words)
