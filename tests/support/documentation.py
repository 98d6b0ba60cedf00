"""Read the documentation's pages: their code blocks, commands, flags and links."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.paths import ROOT, python_path

DOCS = ROOT / "docs"
README = ROOT / "README.md"


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: The page's path.
        line: The line of the opening fence, from 1.
        language: The word after the opening fence.
        text: The lines between the fences, without their common indentation.
    """

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def pages() -> list[Path]:
    """Return the pages at the top of the repository and all pages of the site."""
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the code blocks of a page."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        indent, language, content = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE))


def bash_blocks(page: Path) -> list[Block]:
    """Return the blocks of a page that hold commands."""
    return [block for block in blocks(page) if block.language == "bash"]


def run_script(script: str, folder: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a script of a page by bash in a folder, with the program `maskmoe` of this environment on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": python_path(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a block, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
