"""Requests to `vllm serve` get transformers' greedy text, and its log-probabilities to 1e-4."""

import json
import shutil
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.datasets import write_character_tokenizer
from support.tiny_maskmoe import VOCAB_SIZE, make_served_model, random_prompts, save_model, transformers_answer
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a tokenizer whose ids are one character each."""
    folder = save_model(make_served_model("mixed"), tmp_path_factory.mktemp("model"))
    tokenizer = write_character_tokenizer(folder / "tokenizer", VOCAB_SIZE)
    return shutil.copytree(tokenizer, folder, dirs_exist_ok=True)


def ask(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a server's greedy completion, its ids, and the log-probabilities of these ids."""
    content = {"model": "model", "temperature": 0, "logprobs": 0, "return_token_ids": True, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    message = urllib.request.Request(f"{address}/completions", json.dumps(content | request).encode(), headers)
    with urllib.request.urlopen(message, timeout=600) as response:
        (choice,) = json.load(response)["choices"]
    return {"text": choice["text"], "tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"]}


def test_requests_get_the_text_of_transformers(serve: Callable, folder: Path) -> None:
    """200 requests of 1 to 64 ids and 1 to 32 new tokens, in parallel and batched by the server."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    lengths = np.random.default_rng(0).integers(1, 33, 200).tolist()
    prompts = random_prompts(200, longest=64)
    requests = [{"prompt": p, "max_tokens": length} for p, length in zip(prompts, lengths, strict=True)]
    with serve(folder, "--max-model-len", "128") as address, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(partial(ask, address), requests))
    for request, answer in zip(requests, answers, strict=True):
        expected = transformers_answer(model, request["prompt"], request["max_tokens"])
        assert answer["tokens"] == expected.tokens
        assert answer["text"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert answer["logprobs"] == pytest.approx(expected.logprobs[-len(expected.tokens) :], abs=1e-4)
