"""The scripts of a checkout do not run the code of another checkout."""

import subprocess
import sys
from pathlib import Path

from support.paths import ROOT, python_path

CHECK = ROOT / "launch" / "check_checkout.py"


def check(root: Path, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", CHECK, root]
    environment = {"PYTHONPATH": python_path(path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_code_of_this_checkout_is_run(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    for root in (ROOT, tmp_path / "link"):
        assert check(root, ROOT).returncode == 0


def test_code_of_another_checkout_is_refused_in_one_line(tmp_path: Path) -> None:
    result = check(tmp_path, ROOT)
    assert result.returncode == 2
    assert f"runs the MaskMoE of another checkout, {ROOT}, not of {tmp_path}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_installed_package_belongs_to_no_checkout(tmp_path: Path) -> None:
    (tmp_path / "site" / "maskmoe").mkdir(parents=True)
    (tmp_path / "site" / "maskmoe" / "__init__.py").touch()
    assert check(tmp_path, tmp_path / "site").returncode == 0
