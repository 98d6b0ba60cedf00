"""Write docs/megatron.md: what MaskMoE takes from Megatron-Core, and every function of Megatron and torch it replaces.

python docs/generators/patches.py [--check]

The table comes from the docstrings of the patches, which have the sections `Replaces`, `Why` and `Can go`. The text
around the table is in megatron.md.j2.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pages

PACKAGE = Path(__file__).resolve().parents[2] / "maskmoe"
MODULES = (
    PACKAGE / "megatron_compat" / "process_patches.py",
    PACKAGE / "megatron_compat" / "checkpoint_patches.py",
    PACKAGE / "megatron_compat" / "training_patches.py",
)
SECTIONS = ("Replaces", "Why", "Can go")


def render() -> str:
    """Return the page."""
    rows = [row for module in MODULES for row in patches(module)]
    return pages.fill("megatron.md.j2", patches=pages.table(("patch", "replaces", "why", "can go"), rows))


def patches(module: Path) -> Iterator[tuple[str, ...]]:
    """Yield name, replaced functions, reason and condition for removal of each patch of a module.

    Raises:
        ValueError: a patch's docstring lacks a section.
    """
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if text is None or "Replaces:" not in text:
            continue
        sections = sections_of(text)
        missing = [name for name in SECTIONS if name not in sections]
        if missing:
            raise ValueError(f"{module.name}: the docstring of {node.name} has no section {' and no '.join(missing)}")
        yield f"`{node.name}`", *(pages.cell(sections[name]) for name in SECTIONS)


def sections_of(docstring: str) -> dict[str, str]:
    """Return the text of each section of a docstring, by the section's title."""
    titles = "|".join((*SECTIONS, "Args", "Raises", "Returns"))
    _, *parts = re.split(rf"^({titles}):", docstring, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


if __name__ == "__main__":
    pages.run("megatron.md", render, "Write docs/megatron.md from the docstrings of the patches.")
