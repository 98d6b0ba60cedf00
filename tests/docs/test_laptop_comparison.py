"""The reports of the laptop comparison are those of the recorded parts."""

import sys

import pytest
from support.comparisons import without_command
from support.documentation import DOCS
from support.paths import ROOT

from maskmoe.command_line import compare as command

PARTS = "docs/comparison-laptop/parts"


@pytest.mark.parametrize(("suite", "folder"), [("laptop", "."), ("laptop-options", "options")])
def test_report_is_that_of_the_parts(suite, folder, tmp_path, monkeypatch):
    """`maskmoe compare SUITE --merge PARTS --report --output FOLDER` changes nothing, and needs no text."""
    monkeypatch.chdir(ROOT)
    words = ["--merge", PARTS, "--packages", tmp_path, "--run-dir", tmp_path / "run", "--report"]
    words = [f"launch/suites/{suite}.yaml", *words, "--output", tmp_path / "report"]
    monkeypatch.setattr(sys, "argv", ["maskmoe compare", *map(str, words)])
    command.main()
    committed = DOCS / "comparison-laptop" / folder
    new = tmp_path / "report"
    assert {path.name for path in new.iterdir()} == {path.name for path in committed.iterdir() if path.is_file()}
    made, kept = [without_command((path / "README.md").read_text(encoding="utf-8")) for path in (new, committed)]
    assert made == kept
