"""launch/slurm/: the command line of submit.sh, the options of pretrain.sbatch, and the example of a job."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.system import write_script

LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"


def submit(*arguments: object, expect: int = 0, folder: Path = ROOT) -> str:
    command = [ROOT / "launch" / "slurm" / "submit.sh", "--dry-run", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == expect, result.stderr
    return result.stdout if expect == 0 else result.stderr


def words(*arguments: object, folder: Path = ROOT) -> tuple[list[str], list[str], list[str]]:
    """Return three parts of the command line: sbatch's options, the script's options, and the words after `--`."""
    command = shlex.split(submit(*arguments, folder=folder))
    script = command.index(str(ROOT / "launch" / "slurm" / "pretrain.sbatch"))
    model = command.index("--")
    return command[1:script], command[script + 1 : model], command[model + 1 :]


def test_options_are_sorted_into_those_of_sbatch_and_of_the_script(tmp_path):
    options = ("--nodes=4", "--run-dir", tmp_path / "run", "--container", "pyxis", "--image", "a b", "--time=1:00")
    flags = ("--lr", "1e-3", "--hybrid-layer-pattern", "*")  # a shell would replace an unquoted `*`
    sbatch, script, run = words(*options, "--", "launch/models/laptop.yaml", *flags)
    joined = ("--nodes=4", f"--run-dir={tmp_path}/run", "--container=pyxis", "--image=a b", "--time=1:00")
    assert words(*joined, "--", "launch/models/laptop.yaml", *flags) == (sbatch, script, run)
    assert sbatch == [f"--output={tmp_path}/run/slurm/%j.log", f"--chdir={ROOT}", "--nodes=4", "--time=1:00"]
    assert script == ["--root", str(ROOT), *options[3:7], "--run-dir", f"{tmp_path}/run"]
    assert run == [str(LAPTOP), *flags]
    assert not (tmp_path / "run").exists()
    sbatch, script, _ = words("--chain", "5", "--", LAPTOP)
    assert "--array=1-5%1" in sbatch
    assert script[2:] == ["--chain", "--run-dir", f"{ROOT}/runs/laptop"]


def test_paths_are_relative_to_the_current_folder(tmp_path):
    """The job runs in the folder of the caller, and so do the flags of the run. A link is mounted at its own path."""
    (tmp_path / "data").symlink_to("disk/text")
    mounts = ("--mount", "data", "--mount", "data/../scratch:rw")
    sbatch, script, _ = words(*mounts, "--run-dir", "run", "--", LAPTOP, "--data-path", "data/x", folder=tmp_path)
    assert f"--chdir={tmp_path}" in sbatch
    assert script[2:6] == ["--mount", f"{tmp_path}/data", "--mount", f"{tmp_path}/disk/scratch:rw"]
    assert script[6:] == ["--run-dir", f"{tmp_path}/run"]


@pytest.mark.parametrize("arguments", ["launch/models/laptop.yaml", "-- nowhere.yaml", f"--chain many -- {LAPTOP}"])
def test_bad_options(arguments):
    assert submit(*arguments.split(), expect=2).startswith("submit: error: ")


@pytest.mark.parametrize(
    "options", ["--root /", "--container lxc", "--container pyxis", "--train-nodes 3", "--chain", ""]
)
def test_bad_options_of_the_job(tmp_path, options):
    """The script finds the errors before it calls Slurm; without options, the model file is missing."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = [ROOT / "launch" / "slurm" / "pretrain.sbatch", *options.split(), "x.yaml"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | job, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("slurm: error: ")


def test_example_of_a_job_runs_the_script(tmp_path):
    """The example has the directives that pretrain.sbatch has, and passes a model file and flags that exist."""
    write_script(tmp_path / "launch/slurm/pretrain.sbatch", "#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    example = ROOT / "launch" / "slurm" / "example.sbatch"
    job = os.environ | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    passed = subprocess.run([example], env=job, capture_output=True, text=True, check=True).stdout.splitlines()
    options, model, flags = passed[: passed.index("--")], Path(passed[passed.index("--") + 1]), passed[-8:]
    assert options == ["--root", str(tmp_path), "--run-dir", f"{tmp_path}/runs/12l-768d"]
    assert (ROOT / model.relative_to(tmp_path)).exists()
    assert flags[::2] == ["--data-path", "--tokenizer-type", "--tokenizer-model", "--routing-mask"]
    needed = re.findall(r"^#SBATCH --(?!job-name|nodes).*", example.with_name("pretrain.sbatch").read_text(), re.M)
    assert set(needed) <= set(example.read_text().splitlines())
