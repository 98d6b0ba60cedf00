"""`tests/run.sh --megatron`: its argument, and what it installs and runs, on a small stand-in for Megatron-Core."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from support.paths import ROOT

SCRIPTS = ("tests/run.sh", "tests/megatron.sh", "tests/environment.sh", "launch/lib.sh")
VERSION = "0.20.0"
HELPERS = "megatron/core/datasets/helpers_cpp.abi3.so"
PACKAGE = {
    "megatron/core/__init__.py": f"__version__ = {VERSION!r}\n",
    "megatron/training/__init__.py": "",
    HELPERS: "",
}
# Builds a wheel of a checkout, without setuptools, which may have to be downloaded.
BACKEND = """
import os, zipfile
from pathlib import Path

def build_wheel(folder, settings=None, metadata=None):
    assert os.environ["NO_VCS_VERSION"] == "1"
    Path("build").mkdir()
    name = "megatron_core-0.20.0-py3-none-any.whl"
    info = "megatron_core-0.20.0.dist-info"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        for path in Path("megatron").rglob("*.py"):
            wheel.write(path)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: megatron-core\\nVersion: 0.20.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        if Path("compiler").exists():
            wheel.writestr("HELPERS", "")
        wheel.writestr(f"{info}/RECORD", "")
    return name
""".replace("HELPERS", HELPERS)
# Reports the Megatron-Core of a test, and of a Python that the test starts as the scripts of launch/ do.
TEST = """
import importlib.metadata, subprocess
import megatron.core, megatron.training

def test_version():
    report = "import megatron.core; print(megatron.core.__file__)"
    other = subprocess.check_output([".venv/bin/python", "-P", "-c", report], text=True)
    print("test ran with", importlib.metadata.version("megatron-core"), megatron.core.__file__ == other.strip())
    assert megatron.core.__version__ != "broken"
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
CHECKOUT = {**PACKAGE, "pyproject.toml": PYPROJECT, "backend.py": BACKEND, "compiler": ""}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return folder


def write_wheel(folder: Path, version: str = VERSION, files: dict[str, str] = PACKAGE) -> Path:
    info = f"megatron_core-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: megatron-core\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    path = folder / f"megatron_core-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in (files | metadata).items():
            wheel.writestr(name, text)
    return path


class Project:
    """A copy of the scripts, with a package index of one folder and a `.venv` that has the packages of these tests.

    Args:
        root: the folder of the project.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index = root / "index"
        self.index.mkdir()
        for name in SCRIPTS:
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, root / name)
        write_files(
            root,
            {
                "launch/setup.sh": "#!/bin/sh\necho set up",
                "constraints.txt": "megatron-core==0.19.2\n",
                "tests/test_version.py": TEST,
                "pytest.ini": "[pytest]\nmarkers =\n    slow\n    slurm\n    docker\n    te\n    gpu\n",
            },
        )

    def make_venv(self) -> None:
        subprocess.run([sys.executable, "-I", "-m", "venv", "--without-pip", self.root / ".venv"], check=True)
        (site,) = self.root.glob(".venv/lib/python*/site-packages")
        (site / "tests.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")

    def run(self, *arguments: str | Path, expect: int = 0, script: str = "tests/run.sh") -> str:
        """Run the tests of the project, and return the output."""
        unset = ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PIP_CONFIG_FILE": os.devnull}
        process = subprocess.run(
            [self.root / script, *arguments],
            cwd="/",
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert process.returncode == expect, process.stdout
        return process.stdout

    def test(self, megatron: str, expect: int = 0) -> list[str]:
        """Run the project's test with a Megatron-Core, and return the lines of the output."""
        return self.run("--megatron", megatron, "-s", "tests/test_version.py", expect=expect).splitlines()

    def install(self, megatron: str, expect: int = 0) -> list[str]:
        """Install a Megatron-Core for the tests, and return the lines of the output."""
        return self.run(megatron, expect=expect, script="tests/megatron.sh").splitlines()


def version_in(packages: str) -> str:
    return (Path(packages) / "megatron/core/__init__.py").read_text()


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "--megatron needs a version of megatron-core, a checkout of Megatron-LM or a wheel"),
        ([""], "give one version or path of megatron-core (see tests/megatron.sh --help)"),
        (["no/folder"], "no/folder does not exist, and is not a version such as 0.19.2"),
        (["0.19.x"], "0.19.x does not exist, and is not a version such as 0.19.2"),
        (["--help"], "--help does not exist, and is not a version such as 0.19.2"),
        (["launch"], "launch is not a checkout of Megatron-LM: it lacks megatron/core or pyproject.toml"),
        (["launch/lib.sh"], "launch/lib.sh is not a wheel of megatron-core"),
    ],
)
def test_wrong_argument_is_one_line_before_anything_is_set_up(project, arguments, problem):
    output = project.run("--megatron", *arguments, expect=2)
    assert output.startswith(f"tests: error: {problem}")
    assert output.count("\n") == 1
    assert not (project.root / "build").exists()


@pytest.mark.parametrize("version", ["0.19.2", "0.20.0rc1", "0.20.0rc0.dev132713", "0.20.0.post1"])
def test_versions_are_recognised(project, version):
    assert project.run("--check", version, script="tests/megatron.sh") == ""


def test_released_version(project):
    project.make_venv()
    write_wheel(project.index)
    lines = project.test(VERSION)
    (packages,) = (project.root / "build/megatron/0.20.0/lib").glob("python*/site-packages")
    assert lines[:2] == ["set up", "tests: installing megatron-core: 0.20.0"]
    assert f"test ran with {VERSION} True" in "\n".join(lines)
    assert lines[-1] == f"tests: ran with megatron-core {VERSION} ({packages})"
    assert not list(project.root.glob(".venv/lib/python*/site-packages/megatron*"))

    # The installation is kept, and a failing test sets the exit code.
    (packages / "megatron/core/__init__.py").write_text("__version__ = 'broken'")
    lines = project.test(VERSION, expect=1)
    assert "installing" not in lines[1]
    assert lines[-1].startswith("tests: ran with megatron-core 0.20.0 ")


def test_version_that_is_not_in_the_index(project):
    project.make_venv()
    for version in ("0.8.0", "0.9.0", "0.10.0", "0.20.0rc1", "0.20.0"):
        write_wheel(project.index, version)
    output = project.run("--megatron", "0.21.0", expect=2)
    newest = "its newest releases are 0.9.0, 0.10.0, 0.20.0"
    assert output.splitlines()[-1] == f"tests: error: the package index has no megatron-core 0.21.0; {newest}"
    assert not (project.root / "build/megatron/0.21.0").exists()


def test_wheel(project):
    project.make_venv()
    write_wheel(project.root / "downloads")
    wheel = f"downloads/megatron_core-{VERSION}-py3-none-any.whl"
    assert version_in(project.install(wheel)[-1]) == PACKAGE["megatron/core/__init__.py"]
    # A wheel of the same name with other contents is installed again.
    write_wheel(project.root / "downloads", files={**PACKAGE, "megatron/core/__init__.py": "changed"})
    assert version_in(project.install(wheel)[-1]) == "changed"


def test_checkout(project):
    project.make_venv()
    checkout = write_files(project.root / "Megatron-LM", CHECKOUT)
    before = sorted(checkout.rglob("*"))
    announcement, _, packages = project.install("Megatron-LM")
    assert announcement == "tests: installing megatron-core: Megatron-LM"
    assert Path(packages).parents[2] == project.root / "build/megatron/Megatron-LM"
    assert version_in(packages) == PACKAGE["megatron/core/__init__.py"]
    assert sorted(checkout.rglob("*")) == before
    # Python's own files are no change of the checkout.
    write_files(checkout, {"megatron/core/__pycache__/__init__.cpython-313.pyc": ""})
    assert project.install("Megatron-LM/../Megatron-LM/") == [packages]
    # After a change, the checkout is built again.
    write_files(checkout, {"megatron/core/__init__.py": "changed"})
    assert version_in(project.install("Megatron-LM")[-1]) == "changed"


@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("compiler", "the dataset helpers could not be compiled: install the Debian packages g++ and python3-dev"),
        ("megatron/training/__init__.py", "this megatron-core has no megatron.training: Megatron-LM"),
        ("backend.py", "megatron-core could not be installed: {root}/build/megatron/Megatron-LM.log has pip's output"),
    ],
    ids=["no compiler", "no megatron.training", "no build"],
)
def test_checkout_that_cannot_be_used(project, missing, problem):
    """A part that is missing must not come from the Megatron-Core of `.venv`."""
    project.make_venv()
    checkout = write_files(project.root / "Megatron-LM", CHECKOUT)
    (checkout / missing).unlink()
    for _ in range(2):  # the next try begins anew
        assert project.install("Megatron-LM", expect=2)[-1] == f"tests: error: {problem.format(root=project.root)}"


@pytest.mark.slow
def test_without_pytest_arguments_the_sources_are_compared_first(project):
    project.make_venv()
    write_wheel(project.index)
    write_files(
        project.root,
        {
            "docs/generators/internals.py": "import megatron.core as m; exit(f'compared {m.__version__}')",
            ".venv/bin/pyrefly": '#!/bin/sh\necho "checked $@"',
        },
    )
    lines = project.run("--megatron", VERSION, expect=1).splitlines()
    (packages,) = (project.root / "build/megatron/0.20.0/lib").glob("python*/site-packages")
    compared, checked = (
        lines.index("compared 0.20.0"),
        lines.index(f"checked check --search-path {packages} --search-path ."),
    )
    assert compared < checked < len(lines) - 1
    assert "1 passed" in lines[-2]
    assert lines[-1].startswith("tests: ran with megatron-core 0.20.0 ")
