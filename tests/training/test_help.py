"""`--help` of the training commands prints a page at once, and `--help-all` prints all arguments."""

import argparse
import sys
from pathlib import Path

import pytest
from support.launchers import start_ranks

from maskmoe.command_line.main import dispatch
from maskmoe.training.help_page import help_page
from maskmoe.training.settings.arguments import _escape_percent_signs_in_help


def test_full_help_lists_our_arguments_and_megatrons(tmp_path: Path) -> None:
    with start_ranks(["-m", "maskmoe.training.pretrain", "--help-all"], tmp_path) as processes:
        outcome = processes.wait()
    assert outcome.exit_codes == (0,), outcome.report()
    printed = (tmp_path / "out0.log").read_text()
    assert "\nMaskMoE:\n  --routing-mask FILE" in printed
    assert "\n  --num-layers NUM_LAYERS" in printed


@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_help_imports_neither_torch_nor_megatron(name: str, monkeypatch, capsys) -> None:
    """The page is printed in a process in which these imports fail."""
    for package in ("torch", "megatron", "numpy"):
        for module in [module for module in sys.modules if module.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    dispatch([name, "--lr", "1", "--help"])
    printed = capsys.readouterr().out
    assert help_page(name) in printed
    assert "\nMaskMoE:\n  --routing-mask FILE" in printed
    assert "--help-all shows" in printed


def test_help_with_a_stray_percent_sign_is_printed_as_it_is() -> None:
    parser = argparse.ArgumentParser()
    # argparse of Python 3.14 refuses such a help text as soon as it is added.
    action = parser.add_argument("--stray", help="")
    action.help = "headroom (1.10 = 10%)."
    parser.add_argument("--sound", default=3, help="default: %(default)s, at most 10%%")
    _escape_percent_signs_in_help(parser)
    printed = parser.format_help()
    assert "headroom (1.10 = 10%)." in printed
    assert "default: 3, at most 10%" in printed
