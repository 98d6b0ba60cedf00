"""The study "choice or damping": an independent script finds the page's numbers in the tables; README repeats rows."""

import lzma
import re
import subprocess
import sys
from pathlib import Path

from support.paths import ROOT

STUDY = ROOT / "tools" / "studies" / "choice_or_damping"
PAGE = ROOT / "docs" / "study" / "choice-or-damping.md"


def test_page_has_the_numbers_of_its_tables(tmp_path: Path) -> None:
    for name in ("results.jsonl", "measures.jsonl"):
        (tmp_path / name).write_bytes(lzma.decompress((STUDY / "data" / f"{name}.xz").read_bytes()))
    words = [sys.executable, STUDY / "check_numbers.py", tmp_path / "results.jsonl", PAGE]
    outcome = subprocess.run(words, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout


def rows(text: str) -> list[list[str]]:
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| MaskMoE −")]


def test_readme_repeats_rows_of_the_page() -> None:
    of_page = {cells[0]: [cells[2], *cells[5:7]] for cells in rows(PAGE.read_text()) if len(cells) > 9}
    of_readme = rows((ROOT / "README.md").read_text().partition("## Results")[2].partition("##")[0])
    assert len(of_readme) == 6
    for label, *numbers in of_readme:
        assert numbers == of_page[label.replace(", 32 experts, 4,096 ids", ", 9 M tokens, N = 32")]
