"""The scripts of a checkout do not run the code of another checkout, whatever the shell's variables are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    "command",
    [
        "launch/pretrain.sh --dry-run --gpus-per-node 2 launch/models/laptop.yaml",
        "launch/slurm/submit.sh --dry-run -- launch/models/laptop.yaml",
        "launch/docker.sh --dry-run --cpu --engine docker launch/quickstart.sh",
    ],
)
def test_scripts_ignore_the_folders_in_which_cd_searches(command: str) -> None:
    """With CDPATH, `cd` prints the folder, or goes to another one."""
    environment = {name: value for name, value in os.environ.items() if name != "CDPATH"}
    for path in ({}, {"CDPATH": "."}, {"CDPATH": "/"}):
        result = subprocess.run(
            ["bash", *command.split()], cwd=ROOT, env=environment | path, capture_output=True, text=True, timeout=60
        )
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.splitlines()) == 1
