"""The scripts of a checkout, whatever the shell's variables and its Python are."""

import os
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.system import write_script


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
