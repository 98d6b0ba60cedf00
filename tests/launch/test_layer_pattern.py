"""The pattern of a hybrid model, which holds `*` and `|`, passes through every launcher unchanged."""

import os
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.errors import UserError
from maskmoe.launch.model_file import ModelFile

# argparse takes a value that begins with `-` for a flag, unless an equals sign joins flag and value.
PATTERNS = ["*E*E", "*E*E|*-*E/*E/*E", "-*E|+-GE", "--*E"]
# A shell would replace the unquoted first pattern by the names of these files.
FILES = ["xExE", "yEzE"]


def word(pattern: str) -> list[str]:
    """Return the words in which a pattern must arrive."""
    flag = "--hybrid-layer-pattern"
    return [f"{flag}={pattern}"] if pattern.startswith("-") else [flag, pattern]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with files that patterns match."""
    for name in FILES:
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def model(folder: Path):
    """Write a model file with a pattern, and return its path."""

    def write(pattern: str) -> Path:
        path = folder / "model.yaml"
        path.write_text(f'hybrid-layer-pattern: "{pattern}"\nlr: 1e-3\n')
        return path

    return write


def run(command: list[object], folder: Path, **environment: str) -> str:
    """Run a command in a folder, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def words_in_shell(line: str, folder: Path) -> list[str]:
    """Return the words that bash makes of a command line."""
    printed = run(["bash", "-c", rf"printf '%s\n' {line}"], folder)
    return printed.splitlines()


def assert_contains(words: list[str], expected: list[str]) -> None:
    starts = [index for index, word in enumerate(words) if word == expected[0]]
    assert [words[start : start + len(expected)] for start in starts] == [expected], words


def stub(path: Path, program: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)


def test_model_file_without_quotes_is_refused(folder):
    (folder / "model.yaml").write_text("hybrid-layer-pattern: *E*E\n")
    with pytest.raises(UserError, match=r"is not valid YAML: .* write quotes around a value that begins with \*"):
        ModelFile.read(folder / "model.yaml", {})


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("given_by", ["file", "flag"])
def test_pretrain_script(pattern, given_by, model, folder):
    path = model(pattern if given_by == "file" else "MMM")
    flags = [f"--hybrid-layer-pattern={pattern}"] if given_by == "flag" else []
    line = run([ROOT / "launch" / "pretrain.sh", "--dry-run", path, *flags], folder)
    assert_contains(words_in_shell(line, folder), word(pattern))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_slurm_job(pattern, model, folder):
    """The command line of sbatch, and the job script with stand-ins for Slurm's programs."""
    submit = [ROOT / "launch" / "slurm" / "submit.sh", "--dry-run", "--run-dir", folder / "run", "--no-node-check"]
    line = run([*submit, "--address", "n0", "--nodes=1", "--", model("MMM"), *word(pattern)], folder)
    submitted = words_in_shell(line, folder)
    assert_contains(submitted, word(pattern))
    script = submitted.index(str(ROOT / "launch" / "slurm" / "pretrain.sbatch"))
    arguments = submitted[script + 1 :]
    arguments[arguments.index("--root") + 1] = str(folder)
    stub(folder / "launch" / "pretrain.sh", r"""printf '%s\n' "$@" """)
    stub(folder / "bin" / "srun", 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 "$@"')
    stub(folder / "bin" / "scontrol", "echo n0")
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n0"}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    printed = run([ROOT / "launch" / "slurm" / "pretrain.sbatch", *arguments], folder, PATH=path, **job)
    assert_contains(printed.splitlines(), word(pattern))
