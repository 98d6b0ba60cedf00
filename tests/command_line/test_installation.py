"""The package, installed from the checkout into a fresh virtual environment."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.paths import ROOT

import maskmoe
from maskmoe.command_line.main import SUBCOMMANDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[..., str]:
    """Install the package; return a function that runs a program of the environment and returns its output.

    The dependencies are not installed; PYTHONPATH takes them from the tests' own environment.
    """
    folder = tmp_path_factory.mktemp("installation")
    (folder / "empty").mkdir()
    # Build from a copy, because setuptools writes its files beside the sources and reuses old ones.
    source = folder / "source"
    ignored = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    # Link each package of the tests' environment but the editable installation of this one.
    packages = folder / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "maskmoe" not in path.name.lower() and path.suffix != ".pth":
            (packages / path.name).symlink_to(path)
    environment = {**os.environ, "PYTHONPATH": str(packages), "CUDA_VISIBLE_DEVICES": "", "PIP_USER": "0"}

    def run(program: str, *words: object) -> str:
        completed = subprocess.run(
            [folder / "venv" / "bin" / program, *map(str, words)],
            env=environment,
            cwd=folder / "empty",
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-4000:]
        return completed.stdout

    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-build-isolation")
    run("python", *pip, source)
    shutil.rmtree(source)
    return run


def test_help_is_fast(run):
    run("maskmoe", "--help")
    start = time.monotonic()
    output = run("maskmoe", "--help")
    assert time.monotonic() - start < 2  # seconds; importing torch alone takes longer
    assert all(f"  {subcommand.name} " in output for subcommand in SUBCOMMANDS)


def test_command_writes_a_mask(run, tmp_path):
    recipe = "--vocab-size 512 --preset hash --num-experts 8 --num-layers 2"
    run("maskmoe", "mask", *recipe.split(), "--output", tmp_path / "mask.safetensors")
    assert (tmp_path / "mask.safetensors").exists()


def test_metadata_and_files(run):
    program = "import json, importlib.metadata as m; print(json.dumps([m.metadata('maskmoe').json, "
    program += "[str(path) for path in m.files('maskmoe')]]))"
    metadata, files = json.loads(run("python", "-c", program))
    assert metadata["version"] == maskmoe.__version__
    assert metadata["license_expression"] == "Apache-2.0"
    assert sorted(metadata["provides_extra"]) == ["data", "dev", "eval", "gpu", "hf", "muon"]
    assert metadata["description"] == (ROOT / "README.md").read_text()
    package = {
        str(path.relative_to(ROOT))
        for pattern in ("**/*.py", "**/*.yaml", "**/*.j2", "py.typed")
        for path in (ROOT / "maskmoe").glob(pattern)
    }
    assert package
    assert package <= set(files)
    assert not [file for file in files if file.startswith(("tests", "tools"))]
