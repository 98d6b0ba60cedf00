"""A release: the wheel holds what an installed `maskmoe` needs, and all files name the same version."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from support.paths import ROOT

import maskmoe


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, and return the folder of its unpacked files."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("maskmoe", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "packages")
    return folder / "packages"


def test_wheel_holds_all_files_of_the_package(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        # Python 3.13 would follow the links to launch/ by itself with `recurse_symlinks`.
        found = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
        return {str(path.relative_to(folder)) for path in found if path.parent.name != "__pycache__"}

    missing = files(ROOT / "maskmoe") - files(installed / "maskmoe")
    texts = {"laptop.yaml", "laptop-text.yaml", "laptop-text.txt"}  # their text is made by a tool of the repository
    assert missing == {f"launch/suites/{name}" for name in texts}


def test_installed_package_finds_shipped_files(installed: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-P",
        "-m",
        "maskmoe",
        *["pretrain", "--dry-run", "--nproc-per-node", "1", "laptop.yaml", "--mock-data"],
    ]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"{installed}/maskmoe/launch/models/laptop.yaml" in ran.stdout
    assert str(ROOT / "maskmoe") not in ran.stdout


def test_all_files_name_one_version_and_date() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    heading = re.search(r"^## (\S+), (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading.groups() == (maskmoe.__version__, str(citation["date-released"]))
    assert citation["version"] == maskmoe.__version__


def test_public_names_are_found() -> None:
    assert len({getattr(maskmoe, name) for name in maskmoe.__all__}) == len(maskmoe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = maskmoe.nothing
