"""The program `maskmoe`: its help, its errors, and the subcommand that it runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

import maskmoe
from maskmoe.command_line import main as program
from maskmoe.command_line.main import SUBCOMMANDS


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


def test_version():
    assert run("--version").stdout == f"maskmoe {maskmoe.__version__}\n"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("pretain",), "unknown subcommand pretain; maskmoe --help lists the subcommands"),
        ((), r"which subcommand\? \(maskmoe --help lists the subcommands\)"),
    ],
)
def test_bad_command_line_is_refused_in_one_line(words, error):
    completed = run(*words)
    assert completed.returncode == 2
    assert re.fullmatch(f"error: {error}\n", completed.stderr)


def test_subcommand_gets_its_arguments(tmp_path, monkeypatch, capsys):
    """The module of a subcommand runs with the subcommand's name as the program's name."""
    (tmp_path / "recorder.py").write_text("import sys\ndef main():\n    print(sys.argv)\n")
    monkeypatch.setattr(maskmoe, "__path__", [*maskmoe.__path__, str(tmp_path)])
    monkeypatch.setattr(program, "SUBCOMMANDS", {"record": ("recorder", "print sys.argv")})
    program.dispatch(["record", "--a", "b"])
    assert capsys.readouterr().out == "['maskmoe record', '--a', 'b']\n"


def test_each_tool_runs_a_subcommand():
    modules = {module for module, _ in SUBCOMMANDS.values()}
    tools = sorted((ROOT / "tools").glob("*.py"))
    assert tools
    for tool in tools:
        assert f"command_line.{tool.stem}" in modules
        assert f"from maskmoe.command_line.{tool.stem} import main" in tool.read_text()
