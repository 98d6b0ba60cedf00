"""docker/ and launch/docker.sh: the command line, and, with podman, the image: it is built and used."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.paths import ROOT
from support.runs import make_laptop_data, read_losses
from support.system import write_script

import maskmoe

IMAGE = f"maskmoe-cpu:{maskmoe.__version__}"
HOME = "/opt/maskmoe"
SET_UP = "launch/setup.sh --extras hf 2>&1"


def docker(*arguments: object, expect: int = 0, timeout: float = 600, **environment: str) -> str:
    """Run `launch/docker.sh`, and return its output if it succeeds, else its errors."""
    result = subprocess.run(
        [ROOT / "launch" / "docker.sh", *map(str, arguments)],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == expect, result.stdout[-4000:] + result.stderr[-4000:]
    return result.stdout if expect == 0 else result.stderr


def dry_run(*arguments: object, **environment: str) -> list[str]:
    """Return the words of the last command that `launch/docker.sh --dry-run` prints."""
    return shlex.split(docker("--dry-run", *arguments, **environment).splitlines()[-1])


def replace_program(folder: Path, name: str, script: str) -> dict[str, str]:
    """Write a shell script to a folder, and return environment variables with which it replaces a program."""
    program = write_script(folder / "bin" / name, f"#!/bin/bash\n{script}\n")
    return {"PATH": f"{program.parent}:{os.environ['PATH']}"}


# ---- The command -----------------------------------------------------------------------------------------------------


def test_command_line():
    words = dry_run("--engine", "docker", "--cpu", "launch/pretrain.sh", "a b.yaml", "--lr", "1e-3")
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[-5:] == [IMAGE, "launch/pretrain.sh", "a b.yaml", "--lr", "1e-3"]
    assert f"--user={os.getuid()}:{os.getgid()}" in words
    assert {"--ipc=host", "--ulimit=memlock=-1:-1", "--ulimit=stack=67108864:67108864"} <= set(words)
    words = dry_run("--engine", "docker", "--cpu", "--shm-size", "16g", "--code", "image", "true")
    assert "--shm-size=16g" in words
    assert "--ipc=host" not in words
    assert not [word for word in words if f":{HOME}/maskmoe" in word]


def test_mounts(tmp_path):
    (tmp_path / "disk" / "text").mkdir(parents=True)
    data = tmp_path / "data"
    data.symlink_to("disk/text")  # a link is mounted at its own path, and `..` leads to the folder of the target
    mounts = ("--mount", data, "--mount", f"{tmp_path}:rw", "--mount", f"{data}/../text")
    words = dry_run("--engine", "docker", "--run-dir", tmp_path / "new", *mounts, "true")
    volumes = [word.removeprefix("--volume=") for word in words if word.startswith("--volume=")]
    code = [f"{ROOT}/{folder}:{HOME}/{folder}:ro" for folder in ("launch", "maskmoe", "tests", "tools")]
    mounted = [f"{data}:{data}:ro", f"{tmp_path}:{tmp_path}:rw", f"{tmp_path}/disk/text:{tmp_path}/disk/text:ro"]
    assert volumes == [f"{tmp_path}/new:{HOME}/runs", *code, *mounted]
    assert not (tmp_path / "new").exists()  # a dry run creates nothing


def test_signals_reach_the_engine(tmp_path):
    engine = replace_program(
        tmp_path, "podman", "trap 'echo stopped; exit 75' TERM; echo ready; for _ in {1..100}; do sleep 0.1; done"
    )
    command = [ROOT / "launch" / "docker.sh", "--engine", "podman", "--cpu", "--run-dir", tmp_path / "runs", "true"]
    with subprocess.Popen(
        command, env=os.environ | engine, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "stopped\n"
    assert process.returncode == 75


# ---- The image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cpu"])
def test_files_of_a_private_clone_are_readable_in_the_image(tmp_path, file):
    """The step after the copy runs in a clone that was made with umask 077."""
    write_script(tmp_path / ".venv/bin/python", "#!/bin/sh\n")
    write_script(tmp_path / "launch/pretrain.sh", "#!/bin/sh\n").chmod(0o700)
    (tmp_path / "LICENSE").touch(0o600)
    (tmp_path / ".venv/bin/private").touch(0o600)  # a copy of the environment would double the image
    (tmp_path / "launch").chmod(0o700)
    _, _, after_copy = (ROOT / "docker" / file).read_text().partition("COPY . .\n")
    step = next(line.removeprefix("RUN ") for line in after_copy.splitlines() if line.startswith("RUN "))
    subprocess.run(["bash", "-euo", "pipefail", "-c", step], cwd=tmp_path, check=True)
    paths = ("launch", "launch/pretrain.sh", "LICENSE", ".venv/bin/private")
    assert [oct((tmp_path / path).stat().st_mode & 0o777) for path in paths] == ["0o755", "0o755", "0o644", "0o600"]


class Podman:
    """Runs podman with its own images and settings in `build/containers`, which keeps layers for the next tests.

    Containers get this machine's settings of pip and its certificates, since a package registry may need both.

    Args:
        folder: the folder for images and settings.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/graph"\nrunroot = "{folder}/run"\n'
        (folder / "storage.conf").write_text(storage)
        # Set all limits explicitly: by default podman raises hard limits, which may be refused.
        limits = subprocess.check_output(["bash", "-c", "ulimit -Hn; ulimit -Hu"], text=True).split()
        ulimits = [f"nofile=1024:{limits[0]}", f"nproc={limits[1]}:{limits[1]}"]
        settings = {"default_ulimits": ulimits, "netns": "host", "volumes": self._volumes(), "env": self._variables()}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        (folder / "containers.conf").write_text("\n".join(["[containers]", *lines, "[engine]", 'runtime = "runc"', ""]))
        self.environment = {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "BUILDAH_ISOLATION": "chroot",
        }

    @staticmethod
    def _variables() -> list[str]:
        return [
            f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_") or "CA_BUNDLE" in name
        ]

    @staticmethod
    def _volumes() -> list[str]:
        wheels = os.environ.get("PIP_FIND_LINKS", "").split()
        paths = [Path("/etc/pip.conf"), Path("/etc/ssl/certs/ca-certificates.crt"), *map(Path, wheels)]
        return [f"{path}:{path}:ro" for path in paths if path.exists()]

    def __call__(self, *arguments: object) -> str:
        result = subprocess.run(
            ["podman", *map(str, arguments)], env=os.environ | self.environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def docker(self, *arguments: object, **options) -> str:
        """Run `launch/docker.sh` with this podman and the image for CPUs; see the function `docker`."""
        return docker("--engine", "podman", "--cpu", *arguments, **options, **self.environment)

    def make_base_image(self) -> str:
        """Make a base image without a registry, and return its name: this machine's Debian with little but Python."""
        name = "localhost/maskmoe-test-base"
        if not self("images", "--quiet", name).strip():
            release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line)
            sources = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
            mirror = next(
                uri for uri in subprocess.check_output(sources, text=True).splitlines() if uri.startswith("http")
            )
            archive = self.folder / "base.tar"
            options = ["--variant=minbase", "--include=ca-certificates,python3,python3-venv,python3-pip"]
            subprocess.run(
                ["mmdebstrap", *options, release["VERSION_CODENAME"], archive, mirror], check=True, capture_output=True
            )
            self("import", archive, name)
            archive.unlink()
        return name


@pytest.fixture(scope="session")
def podman() -> Podman:
    if not shutil.which("podman"):
        pytest.skip("there is no podman: tests/run.sh --docker installs it")
    return Podman(ROOT / "build" / "containers")


@pytest.fixture(scope="session")
def image(podman) -> str:
    """Build the image for CPUs as users build it, on $BASE_IMAGE if it is set, and return the image's name."""
    base = os.environ.get("BASE_IMAGE") or podman.make_base_image()
    podman.docker("--build", "--base-image", base, timeout=1800)
    return IMAGE


def laptop_arguments(folder: Path, run_dir: str) -> list[str]:
    """Write random data to `folder`, and return the arguments of `launch/pretrain.sh` for a short laptop run."""
    short = "--train-iters 10 --seq-length 64 --log-interval 1 --tensorboard-log-interval 1 --eval-iters 1"
    flags = f"{make_laptop_data(folder, num_documents=100)} {short} --expert-model-parallel-size 2"
    return f"--nproc-per-node 2 --run-dir {run_dir} launch/models/laptop.yaml {flags}".split()


@pytest.mark.docker
def test_environment_is_complete(podman, image):
    """The environment works for an unknown user, without a network and, for training, with a read-only root."""
    options = ("--rm", "--network=none", "--user=4321:4321")
    assert ".venv is up to date" in podman("run", *options, image, "bash", "-c", SET_UP)
    program = (
        "from maskmoe.megatron_compat import prepare_process; prepare_process(); "
        "import torch, transformers; from megatron.training import pretrain; print(torch.__version__)"
    )
    assert podman("run", *options, "--read-only", "--tmpfs=/tmp", image, "python", "-c", program)


@pytest.mark.docker
@pytest.mark.parametrize("code", ["checkout", "image"])
def test_same_losses_as_by_hand(podman, image, tmp_path, code):
    arguments = laptop_arguments(tmp_path, str(tmp_path / "by-hand"))
    subprocess.run([ROOT / "launch" / "pretrain.sh", *arguments], cwd=ROOT, check=True, capture_output=True)
    arguments[arguments.index(f"{tmp_path}/by-hand")] = "runs/contained"
    podman.docker("--code", code, "--run-dir", tmp_path, "--mount", tmp_path, "launch/pretrain.sh", *arguments)
    assert len(read_losses(tmp_path / "contained")) == 10
    assert read_losses(tmp_path / "contained") == read_losses(tmp_path / "by-hand")
    assert (tmp_path / "contained").stat().st_uid == os.getuid()


# A base image with its own torch, copied from the image for CPUs, and an empty package named Transformer Engine.
GPU_BASE = """
FROM {image} AS donor
FROM {base}
RUN --mount=type=bind,from=donor,source=/opt/maskmoe/.venv/lib,target=/donor \\
    packages=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && mkdir -p "$packages" && \\
    cd /donor/python3*/site-packages && \\
    cp -r torch torch-* torchgen functorch nvidia* cuda* triton* sympy* mpmath* networkx* jinja2* markupsafe* \\
        filelock* fsspec* typing_extensions* setuptools* _distutils_hack "$packages" && \\
    mkdir "$packages/transformer_engine-2.9.0.dist-info" && \\
    printf 'Metadata-Version: 2.1\\nName: transformer_engine\\nVersion: 2.9.0\\n' \\
        >"$packages/transformer_engine-2.9.0.dist-info/METADATA"
"""


@pytest.mark.docker
def test_image_for_gpus_keeps_the_torch_of_its_base(podman, image, tmp_path):
    """All steps of docker/Dockerfile work on a stand-in for NVIDIA's image."""
    (tmp_path / "Dockerfile").write_text(GPU_BASE.format(image=image, base=podman.make_base_image()))
    podman("build", "--tag", "localhost/maskmoe-test-gpu-base", tmp_path)
    name = "localhost/maskmoe-test-gpu"
    options = ("--engine", "podman", "--gpus", "all", "--image", name)
    docker(*options, "--build", "--base-image", "localhost/maskmoe-test-gpu-base", timeout=1800, **podman.environment)
    program = (
        "from maskmoe.megatron_compat import prepare_process; prepare_process(); "
        "import maskmoe, megatron.training, torch; print(torch.__file__, maskmoe.__file__, sep='\\n')"
    )
    output = podman("run", "--rm", "--network=none", name, "python", "-c", program).split()
    assert output[-2].startswith("/usr/")
    assert output[-1] == "/opt/maskmoe/maskmoe/__init__.py"
    assert ".venv is up to date" in podman("run", "--rm", "--network=none", name, "bash", "-c", SET_UP)
    # The health check reports that there is no GPU.
    command = ["podman", "run", "--rm", name, "launch/check_node.sh", "--gpus", "--run-dir", "runs"]
    result = subprocess.run(command, env=os.environ | podman.environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "nvidia-smi fails" in result.stderr
