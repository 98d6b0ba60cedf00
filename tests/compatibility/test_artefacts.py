"""Files written by version 0.1.0 at commit 408c863 still load and give the losses recorded then.

`artefacts/` holds token counts, a routing mask, a dataset, a checkpoint of 8 iterations with its optimizer state, the
model exported from that checkpoint, without its code, and `expected.json` with the losses. The model has 2 layers of
width 32 with 4 experts. Losses may differ by 1e-4 of their size, since processors sum floats in different orders.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.launchers import run_program
from support.runs import read_losses

from maskmoe.routing_mask.frequency import TokenFrequency
from maskmoe.routing_mask.mask import RoutingMask

ARTEFACTS = Path(__file__).parent / "artefacts"
EXPECTED = json.loads((ARTEFACTS / "expected.json").read_text())
MASK_DIGEST = "3d6fcafa558833779a167bb445994ca3a06711a02a9ec3804cc37ad54aee6bd6"
DATA_FLAGS = (
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --data-path data_text_document "
    "--split 90,10,0 --data-cache-path cache --load checkpoints --use-checkpoint-args --micro-batch-size 4"
)
TRAINING_FLAGS = (
    "--seq-length 64 --max-position-embeddings 64 --global-batch-size 4 --train-iters 12 --lr 1e-2 --min-lr 1e-3 "
    "--lr-warmup-iters 2 --weight-decay 0.1 --clip-grad 1.0 --log-interval 1 --eval-interval 100 --eval-iters 1 "
    "--tensorboard-dir tensorboard"
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return shutil.copytree(ARTEFACTS, tmp_path / "run")


def run_entry_point(name: str, flags: str, folder: Path) -> None:
    run_program(f"-m maskmoe.training.{name} {DATA_FLAGS} {flags}", folder)


def test_mask_and_counts_load() -> None:
    assert RoutingMask.load(ARTEFACTS / "mask.safetensors").digest == MASK_DIGEST
    assert TokenFrequency.load(ARTEFACTS / "counts.safetensors").occurrences.sum() == 39_914


@pytest.mark.slow
def test_training_resumes_to_the_same_losses(run_folder: Path) -> None:
    run_entry_point("pretrain", TRAINING_FLAGS, run_folder)
    expected = {int(step): loss for step, loss in EXPECTED["train_losses"].items() if int(step) > 8}
    assert read_losses(run_folder) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_evaluation_gives_the_same_loss(run_folder: Path) -> None:
    run_entry_point("evaluate", "--token-frequency counts.safetensors --output evaluation.json", run_folder)
    loss = json.loads((run_folder / "evaluation.json").read_text())["loss"]
    assert loss == pytest.approx(EXPECTED["evaluation_loss"], rel=1e-4)


def test_exported_model_gives_the_same_loss() -> None:
    import transformers

    import maskmoe.huggingface  # noqa: F401  registers the model

    model = transformers.AutoModelForCausalLM.from_pretrained(ARTEFACTS / "model")
    ids = torch.arange(64).remainder(400)[None]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(EXPECTED["model_loss"], rel=1e-4)
