"""The command lines of conversion print their help at once."""

import subprocess
import sys

import pytest

WITHOUT_HEAVY_MODULES = """
import sys
sys.modules |= dict.fromkeys(("megatron", "torch", "transformers"))  # importing them raises an ImportError
sys.argv[0] = "convert"
from maskmoe.command_line.run_tool import run_tool
from maskmoe.command_line.{module} import main
run_tool(main)
"""


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("convert_checkpoint", ["--help"], "hf-to-megatron"),
        ("convert_checkpoint", ["upcycle", "--help"], "--granularity"),
        ("generate_text", ["--help"], "--prompt"),
    ],
)
def test_help_needs_neither_torch_nor_megatron(module, arguments, words):
    command = [sys.executable, "-c", WITHOUT_HEAVY_MODULES.format(module=module), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout


@pytest.mark.parametrize("size", ["5 apples", "0"])
def test_bad_size(size):
    arguments = ["megatron-to-hf", "--load", "x", "--save", "y", "--max-shard-size", size]
    command = [sys.executable, "-c", WITHOUT_HEAVY_MODULES.format(module="convert_checkpoint"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert f"--max-shard-size: {size!r} is not a size such as 5GB" in result.stderr
