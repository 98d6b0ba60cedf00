"""lm-evaluation-harness computes on an exported model what the model computes of each text alone.

The tasks and their data are in `lm_eval/`; nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.paths import EXPORTED_MODEL
from transformers import AutoTokenizer

from maskmoe.huggingface import MaskMoEForCausalLM, export_code

TASKS = Path(__file__).parent / "lm_eval"
# The longest texts have more tokens than the model has positions, so they are scored in windows.
SEQ_LENGTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with an exported model in `model`, with the code of today."""
    folder = tmp_path_factory.mktemp("lm_eval")
    shutil.copytree(EXPORTED_MODEL, folder / "model")
    export_code(folder / "model")
    return folder


@pytest.fixture(scope="module")
def harness(folder) -> dict[str, list[dict]]:
    """The samples that lm-evaluation-harness logged, by task."""
    model_args = f"pretrained={folder / 'model'},dtype=float32,trust_remote_code=True"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--include_path", TASKS]
    command += ["--tasks", "maskmoe_rolling,maskmoe_choice", "--device", "cpu", "--batch_size", "2"]
    command += ["--log_samples", "--output_path", folder / "harness"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | offline
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, (outcome.stdout + outcome.stderr)[-4000:]
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
