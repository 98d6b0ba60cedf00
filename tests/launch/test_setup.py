"""launch/setup.sh: the Python that it chooses, the packages that it installs, and how it recovers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT
from support.system import wait_until, write_script
from support.wheels import make_wheel

BASE_PYTHON = sys._base_executable
SHELL_TOOLS = ("bash", "cut", "dirname", "env", "grep", "paste", "sed", "sort", "timeout", "tr")


def run_bash(program: str, script: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a shell program after the functions of a script."""
    program = f'set -euo pipefail; source "{script}"; {program}'
    return subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True)


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


# ---- Which Python ----------------------------------------------------------------------------------------------------


def pretend_python(path: Path, version: tuple[int, int, int]) -> None:
    """Write a working Python that takes itself for another version."""
    program = (
        f"import runpy, sys; sys.version_info = {version!r}; sys.executable = sys._base_executable = {str(path)!r}; "
        "del sys.argv[0]; runpy.run_path(sys.argv[0])"
    )
    write_script(path, f'#!/bin/sh\nshift\nexec {BASE_PYTHON} -I -c "{program}" "$@"\n')


def broken_shim(path: Path) -> None:
    """Write the program that pyenv puts on PATH for a version that is not activated."""
    write_script(path, f"#!/bin/sh\necho 'pyenv: {path.name}: command not found' >&2\nexit 127\n")


def pyenv(version: str) -> str:
    """Return the path of pyenv's Python on a machine."""
    return f"pyenv/versions/{version}/bin/python3"


@pytest.fixture
def machine(tmp_path) -> Path:
    """Return a folder with shell tools, for a machine without a Python."""
    (tmp_path / "tools").mkdir()
    for tool in SHELL_TOOLS:
        (tmp_path / "tools" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def choose_python(machine: Path, **environment: str) -> tuple[int, str, str]:
    """Choose a Python on a machine: return the exit code, the path relative to the machine, and the errors."""
    variables = {"PATH": f"{machine}/first:{machine}/second:{machine}/tools", "PYENV_ROOT": f"{machine}/pyenv"}
    program = f'SYSTEM_BIN_DIRS=("{machine}/system"); choose_python; echo "$python_path"'
    completed = run_bash(program, ROOT / "launch" / "lib.sh", {**variables, **environment})
    return completed.returncode, completed.stdout.strip().removeprefix(f"{machine}/"), completed.stderr


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"first/python3": (3, 12, 4), "first/python3.13": (3, 13, 0)}, "first/python3"),
        ({"first/python3": (3, 11, 7), "first/python3.13": None, "second/python3.12": (3, 12, 4)}, "second/python3.12"),
        ({"first/python3.12": (3, 12, 4), "second/python3.13": (3, 13, 0)}, "second/python3.13"),
        ({"first/python3": (3, 14, 0), "second/python3.12": (3, 12, 4)}, "second/python3.12"),
        (
            {"system/python3": (3, 11, 2), "system/python3.12": (3, 12, 1), pyenv("3.12.9"): (3, 12, 9)},
            "system/python3.12",
        ),
        ({pyenv("3.9.18"): (3, 9, 18), pyenv("3.12.9"): (3, 12, 9), pyenv("3.12.10"): (3, 12, 10)}, pyenv("3.12.10")),
    ],
)
def test_best_python_is_chosen(machine, pythons, chosen):
    """A name proves nothing: only a Python that runs, in a supported version, counts. None stands for a broken shim."""
    for path, version in pythons.items():
        if version is None:
            broken_shim(machine / path)
        else:
            pretend_python(machine / path, version)
    assert choose_python(machine) == (0, chosen, "")


def test_error_without_a_suitable_python(machine):
    pretend_python(machine / "first/python3", (3, 11, 7))
    pretend_python(machine / "first/python3.14", (3, 14, 0))  # with which Megatron-Core 0.19 fails
    broken_shim(machine / "first/python3.12")
    code, path, errors = choose_python(machine)
    assert (code, path) == (2, "")
    assert re.fullmatch(r"setup: error: no working Python 3\.12 to 3\.13 .*PYTHON=.*\n", errors)


def test_python_variable_decides(machine):
    pretend_python(machine / "first/python3", (3, 13, 0))
    pretend_python(machine / "other/python", (3, 12, 0))
    assert choose_python(machine, PYTHON=f"{machine}/other/python") == (0, "other/python", "")
    pretend_python(machine / "other/python", (3, 11, 7))
    code, _, errors = choose_python(machine, PYTHON=f"{machine}/other/python")
    assert (code, errors) == (2, f"setup: error: PYTHON={machine}/other/python cannot be used: it is Python 3.11\n")


def test_error_without_a_pip(tmp_path):
    """Debian's Python without python3-venv, on a machine that reaches no index."""
    write_script(
        tmp_path / "python",
        f"""#!/bin/sh
        case "$*" in
            *ensurepip*) exit 1 ;;
            *"-m pip"*) echo "ERROR: No matching distribution, PIP_USER=$PIP_USER"; exit 1 ;;
            *) exec {BASE_PYTHON} "$@" ;;
        esac
        """,
    )
    chosen = f"python_path={tmp_path}/python python_version=3.13.0 python_torch=none"
    program = f"set -euo pipefail; root={tmp_path}; choose_python() {{ {chosen}; }}; make_venv"
    completed = run_bash(program, ROOT / "launch" / "lib.sh", {"PATH": os.environ["PATH"], "PIP_USER": "1"})
    assert completed.returncode == 1
    assert completed.stderr.splitlines()[-2:] == [
        "ERROR: No matching distribution, PIP_USER=0",
        f"setup: error: pip could not be installed: {tmp_path}/.venv/maskmoe-setup.log has its output",
    ]


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


def test_output_has_one_line_per_package_and_the_log_has_all(project):
    """All lines are on standard error: a command that sets up first prints its own output alone on standard output."""
    output, errors = project.start("--extras", "dev", stderr=subprocess.PIPE).communicate()
    assert output == ""
    lines = errors.splitlines()
    assert [line for line in lines if line.startswith("setup:   ")] == ["setup:   torch 2.15.0", "setup:   tool 1.0"]
    assert len(lines) == 6
    assert all(line.startswith("setup: ") for line in lines)
    log = (project.venv / "maskmoe-setup.log").read_text()
    assert "Successfully installed maskmoe-0.1.0 tool-1.0 torch-2.15.0" in log


def test_transformer_engine_is_not_built_for_a_torch_without_cuda(project):
    """The environment stays usable, and the next set-up tries again."""
    project.run()
    for _ in range(2):
        *_, reason, _ = project.run("--extras", "gpu", expect=1).splitlines()
        assert reason.startswith("setup: error: torch does not come with the packages of CUDA 13: ")
    assert project.run() == "setup: .venv is up to date\n"


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


def test_set_up_that_is_interrupted_while_it_empties_the_environment_is_repeated(project, tmp_path):
    project.venv.mkdir()
    for name in ("pyvenv.cfg", "more"):
        (project.venv / name).touch()
    find = write_script(tmp_path / "bin" / "find", '#!/bin/sh\nrm -f "$1/pyvenv.cfg"\nkill -KILL $PPID\n')
    project.run(expect=-signal.SIGKILL, PATH=f"{find.parent}:{os.environ['PATH']}")
    assert "making .venv: " in project.run()
    assert not (project.venv / "more").exists()


def test_folder_that_is_not_an_environment_is_kept(project):
    project.venv.mkdir()
    (project.venv / "notes.txt").write_text("mine")
    output = project.run(expect=2)
    assert output.endswith(".venv exists and is not a virtual environment: move it elsewhere\n")
    assert (project.venv / "notes.txt").read_text() == "mine"


def test_file_system_without_locks_is_no_reason_to_wait(project, tmp_path):
    project.venv.mkdir()
    (project.venv / "notes.txt").touch()  # which ends the set-up early
    write_script(tmp_path / "flock", "#!/bin/sh\nexit 65\n")
    first, *_ = project.run(expect=2, PATH=f"{tmp_path}:{os.environ['PATH']}").splitlines()
    assert first == "setup: the file system has no locks: start only one set-up of this folder at a time"


@pytest.mark.parametrize("arguments", [["--extras"], ["--extras", "nonsense"], ["--nonsense"]])
def test_wrong_arguments_are_refused_in_one_line(project, arguments):
    output = project.run(*arguments, expect=2)
    assert re.fullmatch("setup: error: .*\n", output)
    assert not project.venv.exists()


def test_reasons_to_rebuild_an_environment(project):
    """One environment is damaged in several ways. The environment has no packages, to save time."""

    def rebuild_reason(command: str = "venv_is_sound || true", **environment: str) -> str:
        program = f'{command}; echo "${{rebuild_reason:-}}"'
        script = project.root / "launch" / "lib.sh"
        return run_bash(program, script, {"PATH": os.environ["PATH"], **environment}).stdout.strip()

    subprocess.run([BASE_PYTHON, "-m", "venv", "--without-pip", project.venv], check=True)
    (library,) = (project.venv / "lib").iterdir()
    (library / "site-packages" / "pip").mkdir()
    rebuild_reason("probe_python $root/.venv/bin/python; write_stamp dev")
    assert rebuild_reason() == ""
    assert rebuild_reason(PYTHON=BASE_PYTHON) == ""

    pretend_python(project.root / "other" / "python3", (3, 12, 0))
    other_python = f"{project.root}/other/python3"
    assert rebuild_reason(PYTHON=other_python).endswith(f"and PYTHON names {other_python}")

    renamed = library.rename(library.with_name("python3.5"))
    assert rebuild_reason().startswith("it has no pip for Python ")
    renamed.rename(library)

    # `timeout` ends so if the Python has not answered.
    write_script(project.root / "stalled" / "timeout", "#!/bin/sh\nexit 124\n")
    stalled = f"{project.root}/stalled:{os.environ['PATH']}"
    assert rebuild_reason("(venv_is_sound) 2>&1 || true", PATH=stalled) == (
        f"setup: error: {project.venv}/bin/python: it has not answered for 30 s; .venv is unchanged: try again, or "
        "delete .venv to make it anew"
    )

    old_root = project.root
    project.root = old_root.rename(old_root.with_name("moved"))
    assert rebuild_reason() == f"it was made in {old_root}"
    project.root = project.root.rename(old_root)

    (project.venv / "bin" / "python").unlink()
    assert rebuild_reason() == "its Python is broken or missing"


# ---- On top of a torch that an image has -----------------------------------------------------------------------------


@pytest.fixture
def image(tmp_path) -> tuple[Path, Path]:
    """Return a Python with its own prefix, as in a GPU image, and the folder of its packages, torch and tool."""
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
    install_into_image(Path(packages), "torch", "2.15.0a0+nv26.9")
    install_into_image(Path(packages), "tool", "0.5")
    return python, Path(packages)


def install_into_image(packages: Path, name: str, version: str) -> None:
    for old in packages.glob(f"{name}-*.dist-info"):
        shutil.rmtree(old)
    with zipfile.ZipFile(make_package(packages.parent, name, version)) as wheel:
        wheel.extractall(packages)


def test_python_that_has_torch_is_preferred(machine, image):
    pretend_python(machine / "first/python3", (3, 13, 0))
    write_script(machine / "system/python3", f'#!/bin/sh\nexec {image[0]} "$@"\n')
    assert choose_python(machine)[:2] == (0, "image/bin/python3")


@pytest.mark.slow
def test_torch_of_an_image_is_kept(project, image, tmp_path):
    python, packages = image
    (tmp_path / "image-constraints.txt").write_text("other==1.0\n")
    options = {"python": python, "PIP_CONSTRAINT": str(tmp_path / "image-constraints.txt")}
    output = project.run("--extras", "dev", **options)
    assert "setup: keeping this Python's torch 2.15.0a0+nv26.9\n" in output
    assert set(project.installed()) == {"pip", "maskmoe"}
    version, path = project.python("import torch; print(torch.__version__, torch.__file__)").split()
    assert version == "2.15.0a0+nv26.9"
    assert Path(path).is_relative_to(packages)
    assert project.run(**options) == "setup: .venv is up to date\n"

    install_into_image(packages, "torch", "2.17.0a0+nv27.1")
    reason = "the torch of its base Python changed from 2.15.0a0+nv26.9 to 2.17.0a0+nv27.1"
    assert f"setup: making .venv: {reason}\n" in project.run(**options)


def test_constraints_omit_the_packages_of_an_image(image, tmp_path):
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    ours.write_text("# comment\nNumPy==2.5.5\nnew_package==1.0\ntool==1.0\ntorch==2.15.0\n")
    theirs.write_text("numpy==1.26.4\n")
    output = subprocess.check_output(
        [image[0], "-I", ROOT / "launch/image_constraints.py", ours, "2.15.0a0+nv26.9"],
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
