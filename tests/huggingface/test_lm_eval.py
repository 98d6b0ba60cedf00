"""lm-evaluation-harness on an exported model scores texts as `maskmoe.training.evaluate` does on the checkpoint.

The tasks and their data are in `lm_eval/`; nothing is downloaded.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from maskmoe.data.default_corpus import default_corpus
from maskmoe.data.tokenizer_training import train_tokenizer

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
TASKS = Path(__file__).parent / "lm_eval"
# The longest texts have more tokens, so they are scored in windows.
SEQ_LENGTH = 64
MODEL = f"""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length {SEQ_LENGTH}
    --max-position-embeddings {SEQ_LENGTH} --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --num-experts 4 --moe-ffn-hidden-size 96 --moe-router-topk 2 --attention-dropout 0
    --hidden-dropout 0 --init-method-std 0.1 --micro-batch-size 4 --global-batch-size 4 --train-iters 10 --lr 2e-3
    --eval-iters 0 --save-interval 10 --num-workers 0
"""


def run(command: list[object], **environment: str) -> None:
    """Run Python with arguments in the repository; fail the test if it fails."""
    outcome = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a checkpoint in `checkpoints` and the same model in transformers' format in `model`."""
    folder = tmp_path_factory.mktemp("lm_eval")
    texts = [document.text for document in default_corpus(300_000)]
    (folder / "tokenizer.model").write_bytes(train_tokenizer(texts, vocab_size=500, num_threads=1))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"]
    output = ["--output-prefix", folder / "data", "--append-eod"]
    run(["tools/preprocess_data.py", "--input", folder / "corpus.jsonl", *tokenizer, *output])
    mask = shlex.split(
        "--num-experts 4 --num-layers 2 --frequent-mass 0.5 --frequent-visible-experts 3 --assignment uniform"
    )
    run(["tools/count_token_frequency.py", "--data-path", folder / "data_text_document", "--vocab-size", "500",
         "--output", folder / "counts.safetensors"])  # fmt: skip
    run(["tools/build_routing_mask.py", "--token-frequency", folder / "counts.safetensors", *mask,
         "--output", folder / "mask.safetensors"])  # fmt: skip
    data = ["--data-path", folder / "data_text_document", "--data-cache-path", folder / "cache", "--split", "100,0,0"]
    model = [*shlex.split(MODEL), *tokenizer, "--routing-mask", folder / "mask.safetensors"]
    run([*TORCHRUN, "-m", "maskmoe.training.pretrain", *model, *data, "--save", folder / "checkpoints"])
    run(["tools/convert_checkpoint.py", "megatron-to-hf", "--load", folder / "checkpoints", "--save", folder / "model"])
    return folder


@pytest.fixture(scope="module")
def harness(folder) -> dict[str, list[dict]]:
    """The samples that lm-evaluation-harness logged, by task."""
    model_args = f"pretrained={folder / 'model'},dtype=float32,trust_remote_code=True"
    command = ["-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--include_path", TASKS]
    command += ["--tasks", "maskmoe_rolling,maskmoe_choice", "--device", "cpu", "--batch_size", "2"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    run([*command, "--log_samples", "--output_path", folder / "harness"], **offline)
    return {
        task: [
            json.loads(line) for line in next((folder / "harness").rglob(f"samples_{task}_*")).read_text().splitlines()
        ]
        for task in ("maskmoe_rolling", "maskmoe_choice")
    }


def score(folder: Path, texts: list[dict[str, str]]) -> list[float]:
    """Return the log-likelihood of each text by Megatron's model."""
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", folder / "tokenizer.model"]
    files = ["--eval-texts", folder / "texts.jsonl", "--eval-output", folder / "scores.json"]
    load = ["--load", folder / "checkpoints", "--use-checkpoint-args"]
    run([*TORCHRUN, "-m", "maskmoe.training.evaluate", *load, *tokenizer, *files])
    return [text["log_likelihood"] for text in json.loads((folder / "scores.json").read_text())["texts"]]


@pytest.mark.slow
def test_same_log_likelihoods(folder, harness):
    """Log-likelihoods of at most 200 tokens, in fp32, differ only by rounding."""
    texts, expected = [], []
    for sample in harness["maskmoe_rolling"]:
        texts.append({"text": sample["doc"]["text"]})
        expected.append(float(sample["filtered_resps"][0]))
    for sample in harness["maskmoe_choice"]:
        for arguments, response in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            texts.append({"context": arguments["arg_0"], "continuation": arguments["arg_1"]})
            expected.append(float(response[0]))
    assert len(texts) == 11
    assert score(folder, texts) == pytest.approx(expected, rel=1e-5)
