"""Fixtures of the tests of serving: vLLM of build/serving, alone and as a server."""

import json
import os
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.launchers import kill_with_children
from support.paths import ROOT
from support.runs import free_port
from support.system import wait_until

from maskmoe.huggingface import export_code

SERVING_SCRIPTS = Path(__file__).parent


SERVING_BIN = ROOT / "build" / "serving" / "bin"


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes of vLLM: without network and `maskmoe`, with the code beside exported models."""
    home, code = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("code")
    export_code(code)
    own = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(home / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{SERVING_BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(code),
    }
    return dict(os.environ) | own


@pytest.fixture(scope="session")
def run_script(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a script of this folder with the Python of build/serving."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        command = [SERVING_BIN / "python", SERVING_SCRIPTS / name, *map(str, arguments)]
        return subprocess.run(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=3000
        )

    return run


@pytest.fixture(scope="session")
def answer_with_vllm(run_script, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """Return a function from folders of models by name, prompts and options to vLLM's answers by name."""

    def answer(models: dict[str, Path], prompts: list[list[int]], max_tokens: int, **options: Any) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("request")
        request = {"models": {name: str(path) for name, path in models.items()}, "prompts": prompts}
        request |= {"max_tokens": max_tokens, **options}
        (folder / "request.json").write_text(json.dumps(request))
        process = run_script("answer_with_vllm.py", folder / "request.json", folder / "answers.json")
        assert process.returncode == 0, process.stdout[-5000:]
        return json.loads((folder / "answers.json").read_text())

    return answer


@pytest.fixture
def serve(environment: dict[str, str], tmp_path: Path) -> Callable[..., AbstractContextManager[str]]:
    """Return a function that runs `vllm serve` on a model as a context manager, and gives the server's address."""

    @contextmanager
    def serve(folder: Path, *flags: str) -> Iterator[str]:
        port = free_port()
        command = [SERVING_BIN / "vllm", "serve", folder, "--served-model-name", "model", "--trust-remote-code"]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port), *flags]
        command += ["--kv-cache-memory-bytes", str(256 << 20)]
        log = tmp_path / "server.log"
        with open(log, "w") as stream:
            process = subprocess.Popen(
                list(map(str, command)),
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_until(
                lambda: is_healthy(port),
                "the server",
                timeout=900,
                period=1,
                has_ended=lambda: process.poll() is not None,
                report=lambda: log.read_text()[-5000:],
            )
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            kill_with_children(process)

    return serve


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
