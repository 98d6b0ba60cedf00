"""Requests to `vllm serve` get transformers' greedy text, and its log-probabilities to 1e-4."""

import json
import os
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.paths import ROOT, python_path
from support.served_models import transformers_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def quickstart_model(tmp_path_factory) -> Path:
    """The folder of the model of a short quickstart, with its tokenizer."""
    folder = tmp_path_factory.mktemp("quickstart")
    sources = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    lines = [json.dumps({"text": source.read_text()}) for source in sources]
    (folder / "text.jsonl").write_text("".join(f"{line}\n" for line in lines))
    settings = {"vocab-size": 512, "train-iters": 60, "num-layers": 2, "seq-length": 128, "num-experts": 4}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-P", "-m", "maskmoe", "quickstart", "--input", "text.jsonl", "--run-dir", "run", *flags]
    command += ["--frequent-visible-experts", "2"]
    environment = os.environ | {"PYTHONPATH": python_path(ROOT)}
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
    return folder / "run" / "model"


def ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a server's greedy completion, its ids, and the log-probabilities of these ids."""
    content = {"model": "model", "temperature": 0, "logprobs": 0, "return_token_ids": True, **request}
    headers = {"Content-Type": "application/json"}
    message = urllib.request.Request(f"{address}/completions", json.dumps(content).encode(), headers)
    with urllib.request.urlopen(message, timeout=600) as response:
        (choice,) = json.load(response)["choices"]
    return {"text": choice["text"], "tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}


def test_requests_get_the_text_of_transformers(serve, quickstart_model) -> None:
    """200 requests of 1 to 64 ids and 1 to 32 new tokens, in parallel and batched by the server."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    source = tokenizer(Path(json.__file__).read_text())["input_ids"]
    rng, requests = np.random.default_rng(0), []
    for _ in range(200):
        length, start = int(rng.integers(1, 65)), int(rng.integers(0, len(source) - 65))
        requests.append({"prompt": source[start : start + length], "max_tokens": int(rng.integers(1, 33))})
    with serve(quickstart_model, "--max-model-len", "128") as address, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(partial(ask, address), requests))
    for request, answer in zip(requests, answers, strict=True):
        expected = transformers_answer(model, request["prompt"], request["max_tokens"])
        assert answer["tokens"] == expected.tokens
        assert answer["text"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert answer["logprobs"] == pytest.approx(expected.logprobs[-len(expected.tokens) :], abs=1e-4)
