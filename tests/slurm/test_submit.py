"""launch/slurm/submit.sh: the command line that it makes."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAPTOP = ROOT / "launch" / "models" / "laptop.yaml"


def submit(*arguments: object, expect: int = 0, dry_run: bool = True) -> str:
    command = [ROOT / "launch" / "slurm" / "submit.sh", *(["--dry-run"] if dry_run else []), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == expect, result.stderr
    return result.stdout if expect == 0 else result.stderr


def words(*arguments: object) -> tuple[list[str], list[str], list[str]]:
    """sbatch's options, the script's, and what follows `--`."""
    command = shlex.split(submit(*arguments))
    script = command.index(str(ROOT / "launch" / "slurm" / "pretrain.sbatch"))
    model = command.index("--")
    return command[1:script], command[script + 1 : model], command[model + 1 :]


def test_options_go_where_they_belong(tmp_path):
    options = ("--nodes=4", "--run-dir", tmp_path / "run", "--container", "pyxis", "--image", "a b", "--time=1:00")
    sbatch, ours, run = words(*options, "--", "launch/models/laptop.yaml", "--lr", "1e-3")
    assert sbatch == [f"--output={tmp_path}/run/slurm/%j.log", f"--chdir={ROOT}", "--nodes=4", "--time=1:00"]
    assert ours == ["--root", str(ROOT), *options[3:7], "--run-dir", f"{tmp_path}/run"]
    assert run == [str(LAPTOP), "--lr", "1e-3"]
    assert not (tmp_path / "run").exists()


def test_run_folder_is_named_after_the_model():
    sbatch, ours, _ = words("--", LAPTOP)
    assert ours[-2:] == ["--run-dir", f"{ROOT}/runs/laptop"]
    assert sbatch[0] == f"--output={ROOT}/runs/laptop/slurm/%j.log"


def test_chain_is_an_array_of_jobs_one_at_a_time():
    sbatch, ours, _ = words("--chain", "5", "--", LAPTOP)
    assert "--array=1-5%1" in sbatch and "--chain" in ours


def test_elements_of_an_array_have_folders_of_their_own(tmp_path):
    sbatch, ours, run = words("--array=1-3", "--run-dir", tmp_path / "seed-%a", "--", LAPTOP, "--seed", "%a")
    assert sbatch[0] == f"--output={tmp_path}/slurm/%j.log"
    assert ours[-1] == f"{tmp_path}/seed-%a" and run[-1] == "%a"


@pytest.mark.parametrize(
    "arguments, error",
    [
        ((), "which MODEL.yaml?"),
        (("launch/models/laptop.yaml",), "launch/models/laptop.yaml stands alone"),
        (("--", "nowhere.yaml"), "there is no model file nowhere.yaml"),
        (("--chain", "many", "--", LAPTOP), "--chain is a number of jobs, not many"),
        (("--image",), "--image needs a value"),
    ],
)
def test_bad_options(arguments, error):
    message = submit(*arguments, expect=2)
    assert message.startswith("submit: error: ") and error in message and message.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, error",
    [
        ((), "which MODEL.yaml?"),
        (("--nonsense", "x.yaml"), "unknown option --nonsense"),
        (("--root", "/", "x.yaml"), "/ is not the repository"),
        (("--container", "lxc", "x.yaml"), "--container is none, pyxis or apptainer, not lxc"),
        (("--container", "pyxis", "x.yaml"), "--container pyxis needs an --image"),
        (("--train-nodes", "3", "x.yaml"), "--train-nodes 3, but the job has 2 nodes"),
        (("--chain", "x.yaml"), "--chain is for a job array"),
        (("x.yaml",), "there is no model file x.yaml"),
    ],
)
def test_bad_options_of_the_job(tmp_path, arguments, error):
    """Found before anything is asked of Slurm."""
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(ROOT)}
    command = [ROOT / "launch" / "slurm" / "pretrain.sbatch", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | job, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"slurm: error: {error}") and result.stderr.count("\n") == 1
