"""Short names for the files that the package ships."""

from pathlib import Path

import pytest

from maskmoe.files import paths


def test_own_file_needs_no_shipped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ZIP of the sources loses the links to the shipped files."""
    monkeypatch.chdir(tmp_path)
    assert paths.shipped_file("laptop.yaml", "models").is_file()
    monkeypatch.setattr(paths, "_SHIPPED", tmp_path / "nowhere")
    assert paths.shipped_file("laptop.yaml", "models") == Path("laptop.yaml")
