"""lm-evaluation-harness computes on an exported model what the model computes of each text alone.

The tasks and their data are in `lm_eval/`; nothing is downloaded.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from transformers import AutoTokenizer

from maskmoe.data.default_corpus import default_corpus
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.huggingface import MaskMoEForCausalLM

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


def log_likelihood(model, tokens: list[int], num_context: int) -> float:
    """Return the log-likelihood of the tokens after a context, each after as many preceding tokens as fit."""
    total = 0.0
    for begin in range(num_context, len(tokens), SEQ_LENGTH):
        end = min(begin + SEQ_LENGTH, len(tokens))
        window = torch.tensor(tokens[max(0, end - SEQ_LENGTH - 1) : end])
        with torch.no_grad():
            log_probs = model(window[None, :-1]).logits[0].double().log_softmax(dim=-1)
        total += log_probs.gather(1, window[1:, None])[begin - end :].sum().item()
    return total


@pytest.mark.slow
def test_same_log_likelihoods(folder, harness):
    """Log-likelihoods of at most 200 tokens, in fp32, differ only by rounding."""
    model = MaskMoEForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    found, expected = [], []
    for sample in harness["maskmoe_rolling"]:
        found.append(float(sample["filtered_resps"][0]))
        ids = tokenizer.encode(sample["doc"]["text"], add_special_tokens=False)
        expected.append(log_likelihood(model, [tokenizer.eos_token_id, *ids], 1))
    for sample in harness["maskmoe_choice"]:
        for arguments, response in zip(sample["arguments"].values(), sample["filtered_resps"], strict=True):
            found.append(float(response[0]))
            context, continuation = arguments["arg_0"], arguments["arg_1"]
            ids = tokenizer.encode(context + continuation)
            expected.append(log_likelihood(model, ids, len(tokenizer.encode(context.rstrip()))))
    assert len(found) == 11
    assert found == pytest.approx(expected, rel=1e-5)
