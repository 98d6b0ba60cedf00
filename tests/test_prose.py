"""Docstrings, comments and documentation keep to plain sentences."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

FOLDERS = ("maskmoe", "tools", "launch", "docker", "docs", "tests", ".ci")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = (".py", ".sh", ".md", ".sbatch", ".yaml", ".yml", ".j2")

# A sentence starts with its subject or with a verb.
BANNED_STARTS = re.compile(
    r"""(?:^ | (?<=[.:;!?]\ ) | (?<=^-\ ))
    (?: Of\  | Those\ (?:of|that)\  | That\ (?:of|one)\  | What\ (?!is|does|it\ does|happens|changed)\w+
      | Where\ [^.?]*?,\  )""",
    re.VERBOSE,
)
BANNED_PHRASES = re.compile(
    r"""\b (?:
        (?:is|are|was|were|be|been)\ told\b | tells?\ of\b | goes?\ on\ (?:where|from|with|as) | by\ which\b
      | (?:the\ rests | rests\ of)\b | (?:put\ )?in\ the\ place\ of | takes?\ no\ notice | finds?\ back | are\ as\ one
      | (?:is|are)\ of\ use | makes?\ of\ (?:it|them)\b | what\ is\ made\ of | so\ many\ \w+ | as\ it\ is\ said
      | is\ said\ (?:to|in|of) | no\ sooner | (?:where|there)by\b | (?:where|there)(?:from|of)\b
      | is\ no\ (?:JSON|YAML|file|folder|dataset|number|flag|mask|model|checkpoint|path|text|such)\b
      | at\ the\ hand\ of | of\ the\ (?:same\ )?kind\ that | (?:that\ one|those\ ones|the\ latter|the\ former)\b
    )""",
    re.VERBOSE,
)
BANNED_WORDS = re.compile(r"\b(?:legacy|TODO|FIXME|XXX|HACK)\b")


def sentences_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each docstring, comment or Markdown paragraph of a file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from docstrings(text)
        yield from comments(text)
    elif path.suffix in (".md", ".j2"):
        yield from paragraphs(text)
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.lstrip().startswith("#") and not line.startswith("#!"):
                yield number, line.lstrip("# ")


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:  # docstrings, and the texts below attributes
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                if isinstance(value, str):
                    for number, paragraph in paragraphs(value):
                        yield statement.lineno + number - 1, paragraph


def comments(source: str) -> Iterator[tuple[int, str]]:
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if block and token.start[0] != last + 1:
                yield first, " ".join(block)
                block = []
            first = first if block else token.start[0]
            last = token.start[0]
            block.append(token.string.lstrip("#: "))
    if block:
        yield first, " ".join(block)


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs outside code blocks, each as one line."""
    block: list[str] = []
    first, is_code = 1, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            is_code = not is_code
        starts_item = re.match(r"(?:[-*]|\d+\.|\w[\w, ]*:) ", stripped)
        if not stripped or is_code or stripped.startswith(("```", "|", "#", "~~~")) or starts_item:
            if block:
                yield first, " ".join(block)
            block = []
        if stripped and not is_code and not stripped.startswith(("```", "~~~", "|")):
            first = first if block else number
            block.append(re.sub(r"^(?:[-*]|\d+\.) ", "", stripped).lstrip("# "))


def tracked_files() -> list[Path]:
    found = [
        path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and "artefacts" not in path.parts
    ]
    return [path for path in (*found, *(ROOT / name for name in FILES)) if path.is_file()]


def problems(path: Path) -> Iterator[str]:
    for number, text in sentences_of(path):
        plain = re.sub(r"`[^`]*`", "`x`", text)
        for pattern in (BANNED_STARTS, BANNED_PHRASES, BANNED_WORDS):
            for match in pattern.finditer(plain):
                yield f"{path.relative_to(ROOT)}:{number}: {match.group()!r} in: {text[:140]}"


@pytest.mark.parametrize("folder", [*FOLDERS, "."])
def test_sentences_are_plain(folder: str) -> None:
    here = ROOT / folder
    files = [path for path in tracked_files() if (here == path.parent if folder == "." else here in path.parents)]
    found = [line for path in files if path != Path(__file__).resolve() for line in problems(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "sentence",
    [
        "Of the processes, one ends.",
        "It ends. Those of prediction get other ids.",
        "What the router chose, summed up.",
        "Where there is a plan, rows are sent first.",
        "A run goes on where it was.",
        "The record by which tokens return.",
    ],
)
def test_banned_sentences_are_found(sentence: str) -> None:
    assert BANNED_STARTS.search(sentence) or BANNED_PHRASES.search(sentence)


@pytest.mark.parametrize("sentence", ["Return what is visible.", "Write the result into `out` if it is given."])
def test_plain_sentences_are_not(sentence: str) -> None:
    assert BANNED_STARTS.search(sentence) is None
    assert BANNED_PHRASES.search(sentence) is None
