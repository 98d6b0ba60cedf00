"""Fixtures of the tests of conversion: checkpoints that Megatron saves once a session."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from support.datasets import build_mask, count_ids, frequent_ids, write_documents
from support.launchers import run_program

PRETRAIN = "-m maskmoe.training.pretrain"
VOCAB_SIZE = 500  # Megatron pads this to 512, or to 768 for two tensor-parallel ranks
DATA = f"--data-path data --split 90,10,0 --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --num-workers 0"
TRAINING = f"""{DATA} --micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --eval-iters 0
    --save-interval 100 --train-iters 2"""
ALL = """--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2 --routing-mask mask.safetensors"""
UNIFORM = f"{ALL} --untie-embeddings-and-output-weights --moe-shared-expert-intermediate-size 16"
RICH = f"""{ALL} --ffn-hidden-size 40 --moe-layer-freq [0,1] --add-qkv-bias --qk-layernorm --norm-epsilon 1e-6
    --moe-shared-expert-intermediate-size 16 --moe-shared-expert-gate --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 --rotary-percent 0.5 --rotary-base 500000"""
TP2_PP2_EP2 = """--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1
    --expert-model-parallel-size 2 --pipeline-model-parallel-size 2"""


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a dataset and a routing mask, in which training processes run."""
    folder = tmp_path_factory.mktemp("conversion")
    documents = frequent_ids(np.random.default_rng(0), VOCAB_SIZE, num_documents=40)
    frequency = count_ids(write_documents(folder / "data", documents), VOCAB_SIZE)
    build_mask(frequency, 4, 2, frequent_visible_experts=3).save(folder / "mask.safetensors")
    return folder


@pytest.fixture(scope="session")
def checkpoints(workplace: Path) -> Callable[[str], Path]:
    """Return a function from the name of a run to the folder of the run's checkpoints.

    - "ranks": saved by 4 ranks with tensor, pipeline and expert parallelism; all layers are alike.
    - "rich": saved by one rank; one layer is dense, and the model has most settings that can be converted.
    """

    @cache
    def make(name: str) -> Path:
        save = workplace / name
        if name == "ranks":
            run_program(f"{PRETRAIN} {UNIFORM} {TRAINING} {TP2_PP2_EP2} --save {save}", workplace, ranks=4)
        else:
            run_program(f"{PRETRAIN} {RICH} {TRAINING} --save {save}", workplace)
        return save

    return make
