"""Descriptions of text sources: what they may hold, and their digest."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.wheels import refusal_of, source, write_description

from maskmoe.data.text_sources import TextSources
from maskmoe.errors import UserError

WHEEL = Path("words-1.0-py3-none-any.whl")
GOOD = source(WHEEL, "0" * 64)
TABLE = {"format": "sqlite", "table": "Rows", "columns": ["a"]}


def write(path: Path, **keys: object) -> Path:
    return write_description(path, {"prose": [GOOD | keys]})


def test_reads_sources_by_domain(tmp_path: Path) -> None:
    path = write_description(tmp_path / "a.yaml", {"prose": [GOOD], "code": [GOOD]}, {"other": [GOOD | TABLE]})
    sources = TextSources.read(path)
    assert sources.held_out_sets == ("other",)
    assert [each.format for each in sources.sources()] == ["text", "text", "sqlite"]
    assert sources.train["prose"][0].members == ("*.py",)
    write_description(path, {"prose": [GOOD], "code": [GOOD]}, {"other": [GOOD]}, held_out_bytes=9)
    assert TextSources.read(path).held_out_sets == ("prose", "code", "other")


def test_digest_covers_the_content_and_not_the_comments(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml")
    digest = TextSources.read(path).digest
    path.write_text(f"# A comment\n{path.read_text()}")
    assert TextSources.read(path).digest == digest
    assert TextSources.read(write(path, members="*.txt")).digest != digest


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"file": "../words.whl"}, "not the file name of a wheel"),
        ({"file": "words-1.0.tar.gz"}, "not the file name of a wheel"),
        ({"sha256": "0" * 63}, "not a sha256"),
        ({"sha256": "G" * 64}, "not a sha256"),
        ({"package": "-r x"}, "not the name of a package"),
        ({"version": "1;x"}, "not a version"),
        ({"members": []}, "members"),
        ({"max-bytes": "0"}, "max-bytes"),
        ({"format": "pickle"}, "format"),
        ({"format": "csv"}, "format csv needs columns"),
        ({"format": "sqlite", "columns": "a"}, "format sqlite needs table"),
        ({"columns": "a"}, "format text has no columns"),
        ({"clean": "html-breaks"}, "format text has no clean"),
        (TABLE | {"clean": "everything"}, "clean"),
        ({"stray": "1"}, "stray"),
    ],
)
def test_bad_values(tmp_path: Path, keys: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        TextSources.read(write(tmp_path / "a.yaml", **keys))
    assert "\n" not in str(error.value)


def test_bad_domains(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for train, held_out in (({}, None), ({"A/b": [GOOD]}, None), ({"a": []}, None), ({"a": [GOOD]}, {"a": [GOOD]})):
        with pytest.raises(UserError, match=r"text sources .*a\.yaml: "):
            TextSources.read(write_description(path, train, held_out))


VALUES = st.recursive(
    st.none() | st.integers() | st.text(max_size=8) | st.just("0" * 64),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*GOOD, "a", "train"]), inner),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_description_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content: Any = json.loads(write(tmp_path / "a.yaml").read_text())
    place = data.draw(st.sampled_from([content, content["train"], content["train"]["prose"][0]]))
    place[data.draw(st.sampled_from([*place, "a", "held-out", "table", "columns"]))] = data.draw(VALUES)
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps(content))
    assert "\n" not in refusal_of(lambda: TextSources.read(path).digest)
