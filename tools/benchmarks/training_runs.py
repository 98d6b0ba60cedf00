"""Runs of the training entry point on Zipf-distributed ids, for benchmarks of whole runs."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from zipf import zipf_mask, zipf_probabilities

from maskmoe.data.dataset_writing import IndexedDatasetWriter
from maskmoe.routing_mask.assignment import MaskRecipe

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "launch" / "models" / "laptop.yaml"
DOCUMENT_TOKENS = 512
TIME = re.compile(r"elapsed time per iteration \(ms\): ([\d.]+)")
LOSS = re.compile(r"lm loss: (\S+)")
# Huge pages, as in launch/quickstart.sh.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def laptop_flags() -> dict[str, Any]:
    """Return the flags of the laptop model."""
    return yaml.safe_load(MODEL.read_text())


def write_inputs(folder: Path, flags: dict[str, Any], vocab_size: int, num_tokens: int) -> dict[str, Any]:
    """Write a dataset and a routing mask; return the flags that name them.

    Args:
        folder: gets the files.
        flags: the flags of the model.
        vocab_size: number of ids.
        num_tokens: tokens of the dataset.
    """
    rng = np.random.default_rng(0)
    with IndexedDatasetWriter(folder / "zipf", np.dtype(np.uint16)) as writer:
        for _ in range(-(-num_tokens // DOCUMENT_TOKENS)):
            tokens = rng.choice(vocab_size, size=DOCUMENT_TOKENS, p=zipf_probabilities(vocab_size))
            writer.add_documents(tokens, np.array([DOCUMENT_TOKENS]))
    recipe = MaskRecipe(
        num_experts=flags["num-experts"],
        num_layers=flags["hybrid-layer-pattern"].count("E"),
        assignment="balanced",
        frequent_mass=0.4,
        frequent_visible_experts=4,
    )
    zipf_mask(recipe, vocab_size).save(folder / "mask.safetensors")
    return {
        "data-path": folder / "zipf",
        "data-cache-path": folder / "cache",
        "split": "100,0,0",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": vocab_size,
        "routing-mask": folder / "mask.safetensors",
    }


def run_program(words: list[str], threads: int) -> str:
    """Run a program of Python and return what it prints.

    Raises:
        RuntimeError: the program failed.
    """
    command = [sys.executable, *words]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"exit code {run.returncode} of {' '.join(command)}:\n{run.stderr[-2000:]}")
    return run.stdout


def run_training(flags: dict[str, Any], ranks: int, threads: int) -> str:
    """Train on ranks of one machine, and return what they print. A flag whose value is True stands alone."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words += ["-m", "maskmoe.training.pretrain"]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return run_program(words, threads)
