"""Reads the page of a run without the package."""

from html.parser import HTMLParser
from pathlib import Path

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

    def assert_self_contained(self) -> None:
        """Check that the page loads nothing from elsewhere and runs no scripts."""
        assert all(link.startswith("data:image/svg+xml;base64,") for link in self.links)
        assert not self.tags & {"script", "link", "iframe", "object", "embed"}
