"""A folder in which a short run saves a series of checkpoints, and in which commands run."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.runs import free_port

VOCAB_SIZE = 500
NUM_EXPERTS = 4
SPLIT = "70,30,0"
ITERATIONS = (2, 4, 6)
DATA = f"--data-path data --split {SPLIT} --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model"
TRAINING = f"""{DATA} --num-layers 3 --moe-layer-freq [1,0,1] --hidden-size 32 --num-attention-heads 2
    --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --num-experts {NUM_EXPERTS} --ffn-hidden-size 40
    --moe-ffn-hidden-size 24 --moe-router-topk 2 --routing-mask mask.safetensors --init-method-std 0.3
    --micro-batch-size 4 --global-batch-size 4 --lr 3e-2 --lr-decay-style constant --eval-iters 0 --num-workers 0
    --train-iters {ITERATIONS[-1]} --save-interval {ITERATIONS[0]} --save checkpoints"""


@dataclass(frozen=True)
class Workplace:
    """A folder in which processes run.

    The folder has a text (`text.txt`), its tokenizer (`tokenizer.model`), a dataset (`data`), token counts
    (`counts.safetensors`) and a routing mask (`mask.safetensors`).

    Attributes:
        folder: The path of the folder.
    """

    folder: Path

    def run_python(self, *arguments: object) -> subprocess.CompletedProcess:
        """Run Python in the folder, as the only rank of a group."""
        group = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        group |= {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        common = {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        environment = os.environ | {name: str(value) for name, value in (group | common).items()}
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
