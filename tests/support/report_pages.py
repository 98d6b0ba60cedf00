"""Reads the page report.html of a run without the package, and compares it with the run's log."""

import re
from collections.abc import Iterator
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path

import pytest

_LINKS = ("href", "src", "srcset", "data", "action", "poster")


class Page(HTMLParser):
    """A page that has been read.

    Args:
        path: the page.

    Attributes:
        text: the text without marks.
        tags: names of all elements.
        links: values of all attributes that name another file.
        titles: alternative texts of the plots.
        tables: the cells of each row of each table.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.titles: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in _LINKS]
        self.titles += [value for name, value in attrs if name == "alt"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        self.text += data
        if self.tables and self.lasttag in ("td", "th") and data.strip():
            self.tables[-1][-1][-1] += data

    @cached_property
    def settings(self) -> dict[str, str]:
        """The settings by name, without the list of all arguments."""
        return dict(self.tables[0])

    @cached_property
    def values(self) -> dict[int, dict[str, str]]:
        """The values of each iteration in the table of values by the title of the column; empty cells are left out."""
        (table,) = (table for table in self.tables if table and table[0][:1] == ["iteration"])
        titles, *rows = table
        return {
            int(row[0]): {title: cell for title, cell in zip(titles[1:], row[1:], strict=True) if cell} for row in rows
        }

    def assert_self_contained(self) -> None:
        """Check that the page loads nothing from elsewhere and runs no scripts."""
        assert all(link.startswith("data:image/svg+xml;base64,") for link in self.links)
        assert not self.tags & {"script", "link", "iframe", "object", "embed"}


def logged_values(log: str) -> Iterator[tuple[int, str, float]]:
    """Yield iteration, name and value of Megatron's lines about iterations and validations."""
    for line in log.splitlines():
        if match := re.search(r"\] iteration +(\d+)/", line):
            for name, value in re.findall(r"\| +(lm loss|learning rate|grad norm): (\S+)", line):
                yield int(match[1]), name, float(value)
        elif match := re.search(r"validation loss at iteration (\d+) .*lm loss value: (\S+)", line):
            yield int(match[1]), "validation", float(match[2])


def check_page(path: Path, *logs: str) -> dict[int, dict[str, str]]:
    """Check that a page has the values of a run's logs, and return the values of the page.

    Args:
        path: the page.
        logs: what each start of the run printed. Values of a later start replace earlier ones.
    """
    page = Page(path)
    page.assert_self_contained()
    columns = {"lm loss": "loss", "learning rate": "learning rate", "grad norm": "gradient norm"}
    logged = {}
    for log in logs:
        first: float | None = None
        for number, (step, name, value) in enumerate(logged_values(log)):
            logged[step, columns.get(name, "held-out loss")] = value
            if name == "lm loss" and number < 3:
                first = value
            elif name == "lm loss" and first is not None:
                # In the second line of a start, Megatron prints the mean of two iterations.
                logged[step, "loss"], first = 2 * value - first, None
    assert logged
    for (step, column), value in logged.items():
        # The log has three decimals of the gradient's norm, and the page has six digits.
        assert float(page.values[step][column]) == pytest.approx(value, rel=1e-5, abs=6e-4 if "norm" in column else 0)
    return page.values
