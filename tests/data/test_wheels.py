"""Wheels that a stranger may have made: only the expected file is read, within limits."""

import hashlib
import io
import stat
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.wheels import make_wheel, refusal_of

from maskmoe.data import wheels
from maskmoe.data.wheels import read_members, read_wheel
from maskmoe.files.untrusted import UnusableFile


def read(path: Path, *patterns: str) -> list[tuple[str, bytes]]:
    content = path.read_bytes()
    return list(read_members(path, read_wheel(path, hashlib.sha256(content).hexdigest()), patterns))


def test_members_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    make_wheel(path, {"b/": b"", "b/c.py": b"2", "a.py": b"1", "b/d.txt": b"3"})
    assert read(path, "*.py") == [("a.py", b"1"), ("b/c.py", b"2")]
    assert read(path, "b/*", "a*") == [("a.py", b"1"), ("b/c.py", b"2"), ("b/d.txt", b"3")]
    with pytest.raises(UnusableFile, match=r"has no file that matches \*\.md"):
        read(path, "*.md")


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    sha256 = make_wheel(path, {"a.py": b"1"})
    found = make_wheel(path, {"a.py": b"2"})
    with pytest.raises(UnusableFile, match=f"is another file: its sha256 is {found}, not {sha256}"):
        read_wheel(path, sha256)


@pytest.mark.parametrize("name", ["/etc/passwd.py", "../a.py", "a/../../b.py", "a//b.py", "a\nb.py"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    make_wheel(tmp_path / "a.whl", {"fine.py": b"1", name: b"2"})
    with pytest.raises(UnusableFile, match="does not lie inside"):
        read(tmp_path / "a.whl", "fine.py")


def test_links_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        link = zipfile.ZipInfo("a.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        wheel.writestr(link, "/etc/passwd")
        wheel.writestr("b.py", "1")
    with pytest.raises(UnusableFile, match=r"holds the link a\.py"):
        read(tmp_path / "a.whl", "*.py")
    assert read(tmp_path / "a.whl", "b.py") == [("b.py", b"1")]


def test_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.whl"
    make_wheel(path, {"a.py": bytes(1000), "b.py": bytes(1000), "c.txt": b"1"})
    for name, limit, problem in (
        ("_MAX_MEMBER_BYTES", 999, r"holds a\.py of more than"),
        ("_MAX_TEXT_BYTES", 1999, "of matching files"),
        ("_MAX_MEMBERS", 2, "has more than 2 members"),
        ("_MAX_WHEEL_BYTES", 10, "has more than the 10 bytes"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(wheels, name, limit)
            with pytest.raises(UnusableFile, match=problem):
                read(path, "*.py")


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_BZIP2) as wheel:
        wheel.writestr("a.py", "1")
    with pytest.raises(UnusableFile, match="compressed in an unusual way"):
        read(tmp_path / "a.whl", "*.py")


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_wheels_are_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.whl"
    make_wheel(path, {"a.py": b"word " * 40, "b/c.py": b"1", "b/d.txt": b"2"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 0, 1, 30, len(content)]))
    path.write_bytes(content[: len(content) - cut])
    assert "\n" not in refusal_of(lambda: read(path, "*.py"))


def test_a_member_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a.py", bytes(1 << 20))
    size = (1 << 20).to_bytes(4, "little")
    assert content.getvalue().count(size) == 2
    (tmp_path / "a.whl").write_bytes(content.getvalue().replace(size, (5).to_bytes(4, "little")))
    with pytest.raises(UnusableFile, match="is damaged"):
        read(tmp_path / "a.whl", "*.py")
