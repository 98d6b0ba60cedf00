"""launch/setup.sh: the Python that it chooses, the packages that it installs, and how it recovers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT
from support.suites import make_wheel
from support.system import wait_until

BASE_PYTHON = sys._base_executable


def make_package(folder: Path, name: str, version: str, metadata: str = "") -> Path:
    """Write a wheel with one module that knows its version."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"__version__ = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    make_wheel(path, files)
    return path


# ---- The environment -------------------------------------------------------------------------------------------------

# A build backend for a stand-in of the package, whose wheel exists. The backend waits while a file `hold` exists, so
# that a test can interrupt a set-up.
BACKEND = """
import shutil, time
from pathlib import Path

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    Path("building").touch()
    while Path("hold").exists():
        time.sleep(0.02)
    return Path(shutil.copy("maskmoe-0.1.0-py3-none-any.whl", wheel_directory)).name
"""
BUILD_SYSTEM = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# The stand-in needs torch, and `tool` for the extra dev.
METADATA = """Requires-Dist: torch>=2.11.0a0
Provides-Extra: dev
Provides-Extra: hf
Requires-Dist: tool; extra == 'dev'
"""


class Project:
    """A repository with the real launch scripts, a stand-in for the package, and small wheels as its requirements."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.wheels = folder / "wheels"
        self.venv = self.root / ".venv"
        (self.root / "launch").mkdir(parents=True)
        for file in ("setup.sh", "lib.sh", "probe_python.py", "image_constraints.py"):
            shutil.copy(ROOT / "launch" / file, self.root / "launch")
        (self.root / "backend.py").write_text(BACKEND)
        (self.root / "pyproject.toml").write_text(BUILD_SYSTEM)
        self.constrain("torch==2.15.0", "tool==1.0")
        for name, version in [("torch", "2.15.0"), ("torch", "2.16.0"), ("tool", "1.0"), ("tool", "2.0")]:
            make_package(self.wheels, name, version)
        make_package(self.root, "maskmoe", "0.1.0", METADATA)

    def constrain(self, *lines: str) -> None:
        (self.root / "constraints.txt").write_text("\n".join(lines) + "\n")

    def start(
        self, *arguments: str, python: str | Path = BASE_PYTHON, stderr: int = subprocess.STDOUT, **environment: str
    ) -> subprocess.Popen[str]:
        """Start launch/setup.sh with pip's settings for the wheels."""
        settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        return subprocess.Popen(
            ["bash", self.root / "launch" / "setup.sh", *arguments],
            env={**kept, **settings, "PYTHON": str(python), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, expect: int = 0, **options: str | Path) -> str:
        """Run launch/setup.sh, and return its output."""
        process = self.start(*arguments, **options)
        output, _ = process.communicate()
        assert process.returncode == expect, output
        return output

    def wait_until_building(self) -> None:
        wait_until((self.root / "building").exists, "pip to start the build", timeout=60)

    def installed(self) -> dict[str, str]:
        """Return the versions of the packages in the environment's own folder, by name."""
        names = [path.name for path in self.venv.glob("lib/python*/site-packages/*.dist-info")]
        return dict(name.removesuffix(".dist-info").split("-") for name in names)

    def python(self, program: str) -> str:
        return subprocess.check_output([self.venv / "bin" / "python", "-I", "-c", program], text=True).strip()


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


def test_environment_is_made_extended_updated_and_kept(project):
    output = project.run()
    assert "setup: making .venv: it does not exist\n" in output
    assert f"setup: using {BASE_PYTHON} (Python " in output
    assert project.python("import torch; print(torch.__version__)") == "2.15.0"
    assert "tool" not in project.installed()

    # Extras accumulate, in the versions of the constraints file.
    assert "with the extras dev" in project.run("--extras", "dev")
    assert project.installed()["tool"] == "1.0"
    assert "with the extras dev,hf" in project.run("--extras=hf")

    # Changed constraints take effect. If they cannot be met, pip's errors are shown, and the working environment stays.
    project.constrain("torch==2.15.0", "tool==3.0")
    lines = project.run(expect=1).splitlines()
    assert any(line.startswith("ERROR: ") for line in lines)
    log = project.venv / "maskmoe-setup.log"
    assert lines[-1] == f"setup: error: pip could not install the packages: {log} has its output"
    assert project.installed()["tool"] == "1.0"
    project.constrain("torch==2.15.0", "tool==2.0")
    assert "setup: updating .venv" in project.run()
    assert project.installed()["tool"] == "2.0"

    # An environment that is up to date needs neither pip nor packages.
    shutil.rmtree(project.wheels)
    for main in project.venv.glob("lib/python*/site-packages/pip/__main__.py"):
        main.write_text("raise SystemExit('pip was called')\n")
    for arguments in ([], ["--extras", "hf"], ["--extras", "hf,dev"]):
        assert project.run(*arguments) == "setup: .venv is up to date\n"


def test_interrupted_set_up_is_repeated_and_only_one_runs_at_a_time(project):
    (project.root / "hold").touch()
    process = project.start()
    project.wait_until_building()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()

    (project.root / "building").unlink()
    first = project.start()
    project.wait_until_building()
    second = project.start()
    assert "waiting" in second.stdout.readline()
    (project.root / "hold").unlink()
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert "setup: making .venv: an earlier set-up was interrupted\n" in output
    assert second.communicate()[0] == "setup: .venv is up to date\n"
    assert second.returncode == 0


def test_environment_of_another_checkout_is_left_alone(project):
    project.run()
    installed = project.installed()
    other = shutil.copytree(project.root, project.root.with_name("other"), ignore=shutil.ignore_patterns(".venv"))
    (other / ".venv").symlink_to(project.venv)
    project.root = other
    assert f"links to the environment of {project.venv.parent}" in project.run(expect=2)
    assert project.installed() == installed


def test_constraints_omit_the_packages_of_an_image(tmp_path):
    """Packages that the Python has, and packages that the image pins."""
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    ours.write_text("# comment\nImage_Pins==2.5.5\nnew_package==1.0\npytest==1.0\ntorch==2.15.0\n")
    theirs.write_text("image-pins==1.26.4\n")
    output = subprocess.check_output(
        [sys.executable, "-I", ROOT / "launch/image_constraints.py", ours, "2.15.0a0+nv26.9"],
        env={"PIP_CONSTRAINT": f"{theirs} {tmp_path}/absent.txt"},
        text=True,
    )
    assert output.splitlines() == ["torch==2.15.0a0+nv26.9", "new_package==1.0"]


# ---- pyproject.toml, constraints.txt and lib.sh agree ----------------------------------------------------------------

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_minimum_versions_agree():
    lines = (ROOT / "launch" / "lib.sh").read_text().splitlines()
    constants = dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))
    project = PYPROJECT["project"]
    after = ".".join(str(int(part) + minor) for minor, part in enumerate(constants["MAXIMUM_PYTHON"].split(".")))
    assert project["requires-python"] == f">={constants['MINIMUM_PYTHON']},<{after}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + constants["MINIMUM_PYTHON"].replace(".", "")
    (torch,) = [text for text in project["dependencies"] if text.startswith("torch>")]
    assert torch.startswith(f"torch>={constants['MINIMUM_TORCH']}.")
    assert sorted(project["optional-dependencies"]) == constants["EXTRAS"].strip("()").split()


def test_every_requirement_has_a_tested_version_in_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    tested = (text for name in ("data", "dev", "eval", "gpu", "hf", "muon", "tune") for text in extras[name])
    for text in [*project["dependencies"], *tested]:
        requirement = Requirement(text)
        if requirement.name != "maskmoe":  # an extra that includes another extra
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
