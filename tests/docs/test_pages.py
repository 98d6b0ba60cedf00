"""Links lead somewhere, the generated pages are up to date, and the site is built."""

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from support.documentation import DOCS, pages, prose
from support.launchers import start_ranks
from support.paths import ROOT


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and pictures that lie in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


GENERATED = ("patches.py", "internals.py")
MADE_BY_THE_BUILD = {DOCS / "flags.md", DOCS / "combinations.md"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if target.resolve() in MADE_BY_THE_BUILD:
            continue
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("script", GENERATED)
def test_generated_page_is_up_to_date(script: str, tmp_path: Path) -> None:
    if script == "internals.py" and not version("megatron-core").startswith("0.19."):
        pytest.skip("the page is about another version of Megatron-Core")
    program = [str(DOCS / "generators" / script), "--check"]
    with start_ranks(program, tmp_path, working_folder=ROOT, are_preloaded=True) as processes:
        outcome = processes.wait()
    assert outcome.exit_codes == (0,), outcome.report()


@pytest.mark.slow
def test_site_is_built(tmp_path: Path) -> None:
    """Every warning fails the build. The site has pages and pictures, and no data files or programs."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "flags.html").exists()
    assert [path.name for path in tmp_path.rglob("*.json*")] == ["search_index.json"]
    assert not [*tmp_path.rglob("*.py"), *tmp_path.rglob("*.j2")]
