"""The packages of text and masks, and their tools, start without torch."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

PACKAGES = ("maskmoe.data", "maskmoe.routing_mask")
HEAVY = ("torch", "megatron", "transformers", "matplotlib", "scipy")
# The tools that docs/index.md names, and the packages that its short installation leaves out.
TOOLS = (
    *("make_corpus", "train_tokenizer", "preprocess_data", "count_token_frequency"),
    "build_routing_mask",
)
NOT_INSTALLED = ("torch", "megatron", "transformers", "matplotlib", "psutil", "jinja2", "tensorboard", "pyarrow")


def imported(modules: list[str], heavy: tuple[str, ...]) -> set[str]:
    """Import modules in a fresh process; return the libraries of `heavy` that this imports."""
    code = f"import sys; {'; '.join(f'import {name}' for name in modules)}; print(*{{*{heavy}}} & {{*sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_no_heavy_library(package: str) -> None:
    folder = importlib.import_module(package).__path__
    modules = [f"{package}.{module.name}" for module in pkgutil.iter_modules(folder)]
    assert len(modules) >= 5
    assert imported(modules, HEAVY) == set()


def test_tools_of_the_short_installation_import_no_further_package() -> None:
    assert imported([f"maskmoe.command_line.{tool}" for tool in TOOLS], NOT_INSTALLED) == set()
