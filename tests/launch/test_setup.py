"""launch/setup.sh: the Python it finds, what it leaves alone, and how it recovers. Nothing is downloaded."""

import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LAUNCH_FILES = ("setup.sh", "lib.sh", "probe_python.py", "image_constraints.py")
BASE_PYTHON = sys._base_executable
SHELL_TOOLS = ("bash", "cut", "dirname", "env", "grep", "ls", "mkdir", "paste", "sed", "sort", "timeout", "tr")


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def broken_shim(path):
    """What pyenv leaves on PATH for a version that is not switched on."""
    return write_script(path, f"#!/bin/sh\necho 'pyenv: {path.name}: command not found' >&2\nexit 127\n")


def python_pretending(path, version):
    """A Python at `path` that works and takes itself for another version."""
    program = (
        f"import runpy, sys; sys.version_info = {version!r}; sys.executable = sys._base_executable = {str(path)!r}; "
        "del sys.argv[0]; runpy.run_path(sys.argv[0])"
    )
    return write_script(path, f'#!/bin/sh\nshift\nexec {BASE_PYTHON} -I -c "{program}" "$@"\n')


def make_wheel(folder, name, version, requires=(), files=None):
    files = files or {f"{name}/__init__.py": f"__version__ = {version!r}\n"}
    info = f"{name}-{version}.dist-info"
    requirements = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requirements}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for file, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(file, text)


# A build backend for a stand-in of the package that needs torch, and `tool` with the extra dev. It waits while there is
# a file `hold`, so that a set-up can be caught at work.
BACKEND = """
import time, zipfile
from pathlib import Path

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    Path("building").touch()
    while Path("hold").exists():
        time.sleep(0.02)
    info = "maskmoe-0.1.0.dist-info"
    files = {
        "maskmoe.pth": str(Path.cwd()),
        f"{info}/METADATA": "Metadata-Version: 2.1\\nName: maskmoe\\nVersion: 0.1.0\\nRequires-Dist: torch>=2.11.0a0\\n"
            "Provides-Extra: dev\\nProvides-Extra: hf\\nRequires-Dist: tool; extra == 'dev'\\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\\n" for file in [*files, f"{info}/RECORD"])
    name = "maskmoe-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / name, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
"""


class Project:
    """A repository with the real launch scripts and a stand-in for the package, whose requirements are tiny wheels."""

    def __init__(self, folder):
        self.root = folder / "project"
        self.wheels = folder / "wheels"
        self.venv = self.root / ".venv"
        (self.root / "launch").mkdir(parents=True)
        for file in LAUNCH_FILES:
            shutil.copy(ROOT / "launch" / file, self.root / "launch")
        (self.root / "setup.py").touch()
        (self.root / "backend.py").write_text(BACKEND)
        build_system = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        (self.root / "pyproject.toml").write_text(build_system)
        self.constrain("torch==2.15.0", "tool==1.0")
        for name, version in [("torch", "2.15.0"), ("torch", "2.16.0"), ("tool", "1.0"), ("tool", "2.0")]:
            make_wheel(self.wheels, name, version)

    def constrain(self, *lines):
        (self.root / "constraints.txt").write_text("\n".join(lines) + "\n")

    def start(self, *arguments, python=BASE_PYTHON, **environment):
        settings = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        return subprocess.Popen(
            ["bash", self.root / "launch" / "setup.sh", *arguments],
            env={**kept, **settings, "PYTHON": str(python), **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments, expect=0, **options):
        process = self.start(*arguments, **options)
        output, _ = process.communicate()
        assert process.returncode == expect, output
        return output

    def wait_until_building(self):
        deadline = time.monotonic() + 60
        while not (self.root / "building").exists():
            assert time.monotonic() < deadline, "pip did not start to build"
            time.sleep(0.02)

    def installed(self):
        """Versions by name of what the environment itself holds."""
        names = [path.name for path in self.venv.glob("lib/python*/site-packages/*.dist-info")]
        return dict(name.removesuffix(".dist-info").split("-") for name in names)

    def python(self, program):
        return subprocess.check_output([self.venv / "bin" / "python", "-I", "-c", program], text=True).strip()


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def image_python(tmp_path):
    """A Python of its own prefix, as in a GPU image, that has a torch that no index offers, and an old tool."""
    prefix = tmp_path / "image"
    library = f"lib/python{sys.version_info.major}.{sys.version_info.minor}"
    (prefix / library).mkdir(parents=True)
    for path in Path(os.__file__).parent.iterdir():
        if path.name not in ("site-packages", "dist-packages"):
            (prefix / library / path.name).symlink_to(path)
    for path in Path(sys.base_prefix, "lib").glob("libpython*"):
        (prefix / "lib" / path.name).symlink_to(path)
    (prefix / "bin").mkdir()
    python = prefix / "bin" / "python3"
    shutil.copy(BASE_PYTHON, python)
    program = "import site, sys; print(sys.prefix, site.getsitepackages()[0], sep='\\n')"
    found_prefix, packages = subprocess.check_output([python, "-I", "-c", program], text=True).split()
    assert Path(found_prefix) == prefix
    assert Path(packages).is_relative_to(prefix)
    install_into_image(packages, "torch", "2.15.0a0+nv26.9")
    install_into_image(packages, "tool", "0.5")
    return python, Path(packages)


def install_into_image(packages, name, version):
    for old in Path(packages).glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    make_wheel(Path(packages).parent, name, version)
    with zipfile.ZipFile(Path(packages).parent / f"{name}-{version}-py3-none-any.whl") as wheel:
        wheel.extractall(packages)


# ---- Which Python ----------------------------------------------------------------------------------------------------


class Machine:
    """A machine with the Pythons that a test puts on it, and no others."""

    def __init__(self, folder):
        self.folder = folder
        self.first, self.second = folder / "first", folder / "second"
        self.system, self.pyenv = folder / "system", folder / "pyenv"
        (folder / "tools").mkdir()
        for tool in SHELL_TOOLS:
            (folder / "tools" / tool).symlink_to(shutil.which(tool))

    def choose(self, **environment):
        program = f'set -euo pipefail; source "{ROOT}/launch/lib.sh"; SYSTEM_BIN_DIRS=("{self.system}"); '
        path = f"{self.first}:{self.second}:{self.folder}/tools"
        process = subprocess.run(
            ["bash", "-c", program + 'choose_python; echo "$python_path"'],
            env={"PATH": path, "PYENV_ROOT": str(self.pyenv), **environment},
            capture_output=True,
            text=True,
        )
        return process.returncode, process.stdout.strip(), process.stderr

    def chosen(self, **environment):
        code, path, errors = self.choose(**environment)
        assert code == 0, errors
        return Path(path)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_python3_is_taken_if_new_enough(machine):
    expected = python_pretending(machine.first / "python3", (3, 12, 4))
    python_pretending(machine.first / "python3.13", (3, 13, 0))
    assert machine.chosen() == expected


def test_names_are_only_believed_when_they_run(machine):
    python_pretending(machine.first / "python3", (3, 11, 7))
    broken_shim(machine.first / "python3.13")
    broken_shim(machine.first / "python3.12")
    write_script(machine.first / "python3.14", "#!/bin/sh\necho 3.14.0\n")
    expected = python_pretending(machine.second / "python3.12", (3, 12, 4))
    assert machine.chosen() == expected


def test_newest_name_on_path_comes_first(machine):
    python_pretending(machine.first / "python3.12", (3, 12, 4))
    expected = python_pretending(machine.second / "python3.13", (3, 13, 0))
    assert machine.chosen() == expected


def test_a_python_with_ready_made_wheels_goes_before_a_newer_one(machine):
    newer = python_pretending(machine.first / "python3", (3, 14, 0))
    assert machine.chosen() == newer
    expected = python_pretending(machine.second / "python3.12", (3, 12, 4))
    assert machine.chosen() == expected


def test_then_the_system_then_pyenv(machine):
    python_pretending(machine.pyenv / "versions/3.9.18/bin/python3", (3, 9, 18))
    python_pretending(machine.pyenv / "versions/3.12.9/bin/python3", (3, 12, 9))
    newest = python_pretending(machine.pyenv / "versions/3.12.10/bin/python3", (3, 12, 10))
    assert machine.chosen() == newest
    expected = python_pretending(machine.system / "python3.12", (3, 12, 1))
    python_pretending(machine.system / "python3", (3, 11, 2))
    assert machine.chosen() == expected


def test_without_a_suitable_python_one_line_says_so(machine):
    python_pretending(machine.first / "python3", (3, 11, 7))
    broken_shim(machine.first / "python3.12")
    code, path, errors = machine.choose()
    assert (code, path) == (2, "")
    assert re.fullmatch(r"setup: error: no Python 3\.12 or newer .*PYTHON=.*\n", errors)


def test_python_variable_decides(machine):
    python_pretending(machine.first / "python3", (3, 13, 0))
    wanted = python_pretending(machine.folder / "elsewhere/python", (3, 12, 0))
    assert machine.chosen(PYTHON=str(wanted)) == wanted


@pytest.mark.parametrize(("version", "reason"), [((3, 11, 7), "it is Python 3.11"), (None, "does not run")])
def test_unsuitable_python_variable_is_an_error(machine, version, reason):
    python_pretending(machine.first / "python3", (3, 13, 0))
    path = machine.folder / "elsewhere/python"
    wanted = python_pretending(path, version) if version else broken_shim(path)
    code, _, errors = machine.choose(PYTHON=str(wanted))
    assert code == 2
    assert errors.startswith(f"setup: error: PYTHON={wanted} cannot be used: ")
    assert reason in errors
    assert errors.count("\n") == 1


def test_a_virtual_environment_stands_for_the_python_below_it(machine):
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", machine.folder / "active"], check=True)
    machine.first = machine.folder / "active" / "bin"
    assert os.path.samefile(machine.chosen(), BASE_PYTHON)
    assert machine.folder not in machine.chosen().parents


def test_a_python_that_has_torch_goes_first(machine, image_python):
    python_pretending(machine.first / "python3", (3, 13, 0))
    write_script(machine.system / "python3", f'#!/bin/sh\nexec {image_python[0]} "$@"\n')
    assert machine.chosen() == image_python[0]


# ---- The environment -------------------------------------------------------------------------------------------------


def test_life_of_an_environment(project):
    output = project.run()
    assert "setup: making .venv: there is none yet\n" in output
    assert f"setup: using {BASE_PYTHON} (Python " in output
    assert project.python("import torch; print(torch.__version__)") == "2.15.0"
    assert "tool" not in project.installed()

    # Extras add up, in the versions of the constraints file.
    assert "with the extras dev" in project.run("--extras", "dev")
    assert project.installed()["tool"] == "1.0"
    assert "with the extras dev,hf" in project.run("--extras=hf")

    # Changed constraints take effect; ones that cannot be met leave what worked.
    project.constrain("torch==2.15.0", "tool==3.0")
    assert "setup: error: pip could not install" in project.run(expect=1)
    assert project.installed()["tool"] == "1.0"
    project.constrain("torch==2.15.0", "tool==2.0")
    assert "setup: updating .venv" in project.run()
    assert project.installed()["tool"] == "2.0"

    # With nothing to do, neither pip nor packages are needed.
    shutil.rmtree(project.wheels)
    for main in project.venv.glob("lib/python*/site-packages/pip/__main__.py"):
        main.write_text("raise SystemExit('pip was called')\n")
    for arguments in ([], ["--extras", "hf"], ["--extras", "hf,dev"]):
        assert project.run(*arguments) == "setup: .venv is up to date\n"


def test_a_set_up_that_was_cut_off_is_done_anew_and_only_by_one_at_a_time(project):
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
    assert "setup: making .venv: an earlier set-up was cut off\n" in output
    assert second.communicate()[0] == "setup: .venv is up to date\n"
    assert second.returncode == 0


def test_torch_of_an_image_is_kept(project, image_python, tmp_path):
    python, packages = image_python
    project.constrain("torch==2.15.0", "tool==1.0")
    (tmp_path / "image-constraints.txt").write_text("other==1.0\n")
    options = {"python": python, "PIP_CONSTRAINT": str(tmp_path / "image-constraints.txt")}
    output = project.run("--extras", "dev", **options)
    assert "setup: keeping the torch 2.15.0a0+nv26.9 that is installed there\n" in output
    assert set(project.installed()) == {"pip", "maskmoe"}
    version, path = project.python("import torch; print(torch.__version__, torch.__file__)").split()
    assert version == "2.15.0a0+nv26.9"
    assert Path(path).is_relative_to(packages)
    assert project.run(**options) == "setup: .venv is up to date\n"

    install_into_image(packages, "torch", "2.17.0a0+nv27.1")
    reason = "the torch below it changed from 2.15.0a0+nv26.9 to 2.17.0a0+nv27.1"
    assert f"setup: making .venv: {reason}\n" in project.run(**options)


def test_image_constraints_leave_to_the_image_what_it_decides(image_python, tmp_path):
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    ours.write_text("# comment\nNumPy==2.5.5\nnew_package==1.0\ntool==1.0\ntorch==2.15.0\n")
    theirs.write_text("numpy==1.26.4\n")
    output = subprocess.check_output(
        [image_python[0], "-I", ROOT / "launch/image_constraints.py", ours, "2.15.0a0+nv26.9"],
        env={"PIP_CONSTRAINT": f"{theirs} {tmp_path}/absent.txt"},
        text=True,
    )
    assert output.splitlines() == ["torch==2.15.0a0+nv26.9", "new_package==1.0"]


@pytest.fixture
def stamped(project):
    """A project with a .venv as after a set-up, but for the packages."""
    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", project.venv], check=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    (project.venv / "lib" / f"python{version}" / "site-packages" / "pip").mkdir()
    judge(project, "probe_python $root/.venv/bin/python; write_stamp dev")
    return project


def judge(project, command="venv_is_sound || true", **environment):
    """The reason why the project's .venv cannot be kept, empty if it can."""
    program = f'set -euo pipefail; source "{project.root}/launch/lib.sh"; {command}; echo "${{rebuild_reason:-}}"'
    environment = {"PATH": os.environ["PATH"], **environment}
    return subprocess.check_output(["bash", "-c", program], env=environment, text=True).strip()


def test_a_sound_environment_is_kept(stamped):
    assert judge(stamped) == ""
    assert judge(stamped, PYTHON=BASE_PYTHON) == ""


def test_an_environment_is_made_anew_when_its_python_is_gone(stamped):
    (stamped.venv / "bin" / "python").unlink()
    assert judge(stamped) == "its Python is broken or gone"


def test_an_environment_is_made_anew_when_it_holds_another_pythons_packages(stamped):
    (library,) = (stamped.venv / "lib").iterdir()
    library.rename(library.with_name("python3.5"))
    assert judge(stamped).startswith("it has no pip for Python ")


def test_an_environment_is_made_anew_when_its_folder_was_moved(stamped):
    old = stamped.root
    stamped.root = old.rename(old.with_name("moved"))
    assert judge(stamped) == f"it was made in {old}"


def test_an_environment_is_made_anew_for_another_python(stamped, image_python):
    assert judge(stamped, PYTHON=str(image_python[0])).endswith(f"and PYTHON names {image_python[0]}")


def test_a_folder_that_is_no_environment_is_left_alone(project):
    project.venv.mkdir()
    (project.venv / "notes.txt").write_text("mine")
    output = project.run(expect=2)
    assert output.endswith("is in the way and is no virtual environment: move it elsewhere\n")
    assert (project.venv / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("arguments", [["--extras"], ["--extras", "nonsense"], ["--nonsense"]])
def test_wrong_arguments_are_refused_in_one_line(project, arguments):
    output = project.run(*arguments, expect=2)
    assert re.fullmatch("setup: error: .*\n", output)
    assert not project.venv.exists()


# ---- setup.py, constraints.txt and lib.sh agree ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def package_metadata():
    captured = {}
    original = setuptools.setup
    setuptools.setup = lambda **keywords: captured.update(keywords)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = original
    return captured


def shell_constants():
    lines = (ROOT / "launch" / "lib.sh").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if re.match("[A-Z_]+=", line))


def test_minimum_versions_agree(package_metadata):
    constants = shell_constants()
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert package_metadata["python_requires"] == f">={constants['MINIMUM_PYTHON']}"
    assert ruff["target-version"] == "py" + constants["MINIMUM_PYTHON"].replace(".", "")
    (torch,) = [text for text in package_metadata["install_requires"] if text.startswith("torch>")]
    assert torch.startswith(f"torch>={constants['MINIMUM_TORCH']}.")
    assert sorted(package_metadata["extras_require"]) == constants["EXTRAS"].strip("()").split()


def test_every_requirement_has_a_tested_version_in_its_range(package_metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    extras = package_metadata["extras_require"]
    requirements = [
        Requirement(text) for text in [*package_metadata["install_requires"], *extras["dev"], *extras["hf"]]
    ]
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
