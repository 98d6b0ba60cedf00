"""Write a generated page of the documentation, or check that the committed page is up to date."""

import argparse
import difflib
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jinja2

DOCS = Path(__file__).resolve().parents[1]


def run(page: str, render: Callable[[], str], description: str) -> None:
    """Write `docs/PAGE`; or with `--check`, if the committed page differs, print the difference and exit with code 1.

    Args:
        page: the page's file name.
        render: returns the text of the page.
        description: what the script's `--help` says.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; if the page is stale, exit with code 1")
    arguments = parser.parse_args()
    path, text = DOCS / page, render()
    if not arguments.check:
        path.write_text(text, encoding="utf-8")
        return
    committed = path.read_text(encoding="utf-8") if path.exists() else ""
    if committed != text:
        print(*difflib.unified_diff(committed.splitlines(), text.splitlines(), n=0, lineterm=""), sep="\n")
        sys.exit(f"docs/{page} is stale; run: python {Path(sys.argv[0]).resolve().relative_to(DOCS.parent)}")


def write(render: Callable[[], str]) -> None:
    """Write a page into the file that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(render(), encoding="utf-8")


def fill(template: str, **values: object) -> str:
    """Return the text of a template in this folder with its values filled in."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.get_template(template).render(values)


def wrap(text: str) -> str:
    """Break the paragraphs and list items of a page into lines of at most 120 characters; keep its other blocks."""
    blocks = re.split(r"(^```.*?^```$|\n\n)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(map(wrap_block, blocks))


def wrap_block(block: str) -> str:
    """Break a paragraph or the items of a list into lines; return headings, tables, pictures and code as they are."""
    if re.match(r"[#|!`\n]|$", block):
        return block
    items = re.split(r"\n(?=- )", block.rstrip("\n"))
    filled = (
        textwrap.fill(
            " ".join(item.split()),
            width=120,
            subsequent_indent="  " if item.startswith("- ") else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for item in items
    )
    return "\n".join(filled) + "\n" * block.endswith("\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cell(text: str) -> str:
    """Return plain text as the content of a table's cell: flags in code style, list items on lines of their own."""
    items = [" ".join(item.split()) for item in re.split(r"\n\s*- ", text)]
    items = [re.sub(r"([|*<>])", r"\\\1", item) for item in items]
    items = [re.sub(r"(?<![\w`-])(--[a-z0-9][a-z0-9-]*)", r"`\1`", item) for item in items]
    return "<br>• ".join(items)
