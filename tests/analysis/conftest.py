"""Fixtures: a folder with data, and the checkpoints of a short training run in this folder."""

from pathlib import Path

import numpy as np
import pytest
from support.datasets import build_mask, count_ids, write_documents
from support.launchers import run_program
from support.paths import ROOT
from support.small_series import NUM_EXPERTS, TRAINING, VOCAB_SIZE

from maskmoe.data.indexed_dataset import optimal_dtype
from maskmoe.data.tokenizer import SentencePieceTokenizer
from maskmoe.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its tokenizer, a dataset, token counts and a routing mask."""
    folder = tmp_path_factory.mktemp("routing")
    text = "\n".join(path.read_text() for path in sorted((ROOT / "maskmoe/routing_mask").glob("*.py")))
    (folder / "text.txt").write_text(text)
    (folder / "tokenizer.model").write_bytes(train_tokenizer([text], vocab_size=VOCAB_SIZE, num_threads=1))
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    documents = [np.append(ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(text.split("\n\n"))]
    write_documents(folder / "data", documents, optimal_dtype(VOCAB_SIZE), tokenizer.record())
    frequency = count_ids(folder / "data", VOCAB_SIZE)
    frequency.save(folder / "counts.safetensors")
    mask = build_mask(frequency, NUM_EXPERTS, 3, "uniform", frequent_mass=0.6, frequent_visible_experts=3)
    mask.save(folder / "mask.safetensors")
    return folder


@pytest.fixture(scope="session")
def checkpoints(workplace: Path) -> Path:
    """The folder with the checkpoints of a training run, at `ITERATIONS`."""
    run_program(f"-m maskmoe.training.pretrain {TRAINING}", workplace)
    return workplace / "checkpoints"
