"""Model files with latent attention, at small sizes: trained, resumed in another layout, evaluated, and continued."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.datasets import write_documents, zipf_ids
from support.launch import Launch
from support.paths import ROOT
from support.runs import read_losses

from maskmoe.data.indexed_dataset import optimal_dtype
from maskmoe.launch.command import entry_point, standalone_command
from maskmoe.routing_mask.assignment import MaskRecipe, build_routing_mask

VOCAB_SIZE = 510
DATA = f"--data-path data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
# Every flag changes a size, except those that shorten and log the run. A few steps need a large learning rate.
SMALLER = f"""
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 2 --q-lora-rank 24 --kv-lora-rank 16
    --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 12 --num-experts 8 --moe-ffn-hidden-size 16
    --moe-shared-expert-intermediate-size 16 --moe-router-topk 2 --seq-length 32 --max-position-embeddings 32
    --make-vocab-size-divisible-by 64 --micro-batch-size 2 --global-batch-size 8 --lr-warmup-iters 2 --train-iters 8
    --lr 2e-3 --min-lr 2e-4 --save-interval 4 --eval-iters 1 --tensorboard-log-interval 1
    --routing-mask mask.safetensors {DATA}
"""
RECOMPUTE = "--recompute-granularity selective --recompute-modules mla_up_proj moe_act layernorm mlp"
TENSOR_EXPERT_2 = (
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --expert-model-parallel-size 2"
)
PIPELINE_2 = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*3|tmL"
# Without Transformer Engine there is no precision-aware optimizer.
WITHOUT_TRANSFORMER_ENGINE = "--use-precision-aware-optimizer false --exp-avg-dtype false --exp-avg-sq-dtype false"
MODELS = {
    "fine-grained-22b": "--moe-layer-freq ([0]+[1]*3)",
    "deepseek-v3": f"--moe-layer-freq ([0]*3+[1]) {WITHOUT_TRANSFORMER_ENGINE}",
}
"""Further flags of each small model."""
LAYOUTS = {"fine-grained-22b": f"{TENSOR_EXPERT_2} {RECOMPUTE}", "deepseek-v3": PIPELINE_2}
"""The layout in which each small model is resumed on 2 ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with a dataset, a routing mask, and the model files without their layouts for many GPUs."""
    folder = tmp_path_factory.mktemp("model_runs")
    documents = zipf_ids(np.random.default_rng(0), VOCAB_SIZE)
    write_documents(folder / "data", documents, optimal_dtype(VOCAB_SIZE))
    recipe = MaskRecipe.from_preset("smoe", 8, 5, shared_table=True)
    build_routing_mask(recipe, vocab_size=VOCAB_SIZE).save(folder / "mask.safetensors")
    for name in MODELS:
        model, _, _ = (ROOT / "launch" / "models" / f"{name}.yaml").read_text().partition("\nlayouts:")
        (folder / f"{name}.yaml").write_text(model)
    return folder


@pytest.fixture(scope="module")
def train(folder) -> Callable[..., dict[int, float]]:
    """Run `launch/pretrain.sh` on a small model, and return the losses of all runs in its folder."""

    def train(model: str, run: str, flags: str, processes: int) -> dict[int, float]:
        options = f"--gpus-per-node {processes} --run-dir {run} {model}.yaml"
        words = shlex.split(f"{options} {SMALLER} {MODELS[model]} {flags}")
        with Launch([ROOT / "launch" / "pretrain.sh", *words], folder, folder / run, {}) as launch:
            assert launch.wait() == 0, launch.output[-4000:]
        return read_losses(folder / run)

    return train


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_model_is_trained_resumed_evaluated_and_continued(model, train, folder) -> None:
    undisturbed = train(model, f"{model}-whole", "--expert-model-parallel-size 2", 2)
    train(model, model, "--expert-model-parallel-size 2 --exit-interval 4", 2)
    losses = train(model, model, LAYOUTS[model], 2)
    assert list(losses) == list(range(1, 9))
    # Layouts add numbers in another order, and bf16 numbers are 8e-3 apart.
    assert losses == pytest.approx(undisturbed, rel=5e-3)
    load = f"--load {model}/checkpoints --use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE}"
    for module, flags in (
        ("evaluate", f"{DATA} --eval-output {model}.json"),
        ("generate", f"--prompt '1 2 3' --max-new-tokens 5 --sample-output {model}.txt"),
    ):
        command = standalone_command(1, entry_point(module), shlex.split(f"{load} {flags}"))
        with Launch(command, folder, folder / f"{model}-{module}", {}) as launch:
            assert launch.wait() == 0, launch.output[-4000:]
    evaluation = json.loads((folder / f"{model}.json").read_text())
    assert evaluation["loss"] == pytest.approx(losses[8], rel=0.1)
    assert (folder / f"{model}.txt").read_text().startswith("1 2 3")
