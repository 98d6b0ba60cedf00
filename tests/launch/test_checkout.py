"""The scripts of a checkout do not run the code of another checkout, whatever the shell's variables are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT, python_path
from support.system import write_script


def run_version(script: Path, path: Path) -> subprocess.CompletedProcess[str]:
    """Run `--version` by a checkout's script with the package in a folder."""
    command = [sys.executable, "-P", script, "--version"]
    return subprocess.run(command, env={"PYTHONPATH": python_path(path)}, capture_output=True, text=True, timeout=60)


def test_only_the_code_of_this_checkout_is_run(tmp_path: Path) -> None:
    script = ROOT / "launch" / "run_checkout.py"
    (tmp_path / "link").symlink_to(ROOT)
    for root in (ROOT, tmp_path / "link"):
        assert run_version(root / "launch" / script.name, ROOT).stdout.startswith("maskmoe ")
    other = tmp_path / "other" / "launch"
    other.mkdir(parents=True)
    (other / script.name).write_text(script.read_text())
    result = run_version(other / script.name, ROOT)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert f"runs the MaskMoE of another checkout, {ROOT}, not of {other.parent}" in result.stderr


def test_an_installed_package_belongs_to_no_checkout(tmp_path: Path) -> None:
    folder = tmp_path / "maskmoe" / "command_line"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("def main(): print('installed')")
    (folder.parent / "__init__.py").touch()
    assert run_version(ROOT / "launch" / "run_checkout.py", tmp_path).stdout == "installed\n"


@pytest.mark.parametrize(
    "command",
    [
        "launch/pretrain.sh --dry-run --nproc-per-node 2 launch/models/laptop.yaml",
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


def test_python_that_is_too_old_is_no_installation(tmp_path: Path) -> None:
    """Before launch/setup.sh, the system's Python may be older than the option -P."""
    write_script(tmp_path / "bin" / "python3", "#!/bin/sh\necho 'Unknown option: -P' >&2\nexit 2\n")
    write_script(tmp_path / "launch" / "pretrain.sh", (ROOT / "launch" / "pretrain.sh").read_text())
    path = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    command = [tmp_path / "launch" / "pretrain.sh", "laptop.yaml"]
    result = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (2, "error: MaskMoE is not installed: run launch/setup.sh first\n")


def test_host_that_lacks_the_python_of_the_environment(tmp_path: Path) -> None:
    for folder in (tmp_path / "launch", tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to("/opt/python3.12/bin/python3")
    script = tmp_path / "launch" / "pretrain.sh"
    script.write_text((ROOT / "launch" / "pretrain.sh").read_text())
    result = subprocess.run(["bash", script, "laptop.yaml"], capture_output=True, text=True, timeout=60)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert " has no /opt/python3.12/bin/python3, with which .venv was made: " in result.stderr
