"""Fills the templates of reports and pages."""

from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render_template(package: str, name: str, values: Mapping[str, Any], filters: Mapping[str, Callable]) -> str:
    """Return the text of a file in a package's folder `templates`, in which a missing variable is an error."""
    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=name.endswith(".html.j2"),  # the other reports are plain text or Markdown
    )
    environment.filters |= filters
    return environment.get_template(name).render(values)
