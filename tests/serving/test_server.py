"""Clients of `vllm serve` get transformers' greedy text, and its log-probabilities to 1e-4."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.paths import ROOT, SERVING_BIN, SERVING_SCRIPTS, python_path
from support.served_models import make_served_model, random_prompts, save_model, transformers_answer
from support.tiny_maskmoe import VOCAB_SIZE
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

pytestmark = [pytest.mark.serving, pytest.mark.timeout(3000)]

NUM_CLIENTS, REQUESTS_OF_A_CLIENT = 2, 100


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


def ask(environment: dict[str, str], address: str, requests: list[list[dict]], folder: Path) -> list[list[dict]]:
    """Send the requests of several clients at the same time, each client in its own process; return the answers."""
    clients = []
    for number, of_client in enumerate(requests):
        files = folder / f"requests_{number}.json", folder / f"answers_{number}.json"
        files[0].write_text(json.dumps(of_client))
        command = [SERVING_BIN / "python", SERVING_SCRIPTS / "ask_server.py", address, *files]
        clients.append((subprocess.Popen(command, env=environment), files[1]))
    assert [client.wait(1800) for client, _ in clients] == [0] * len(clients)
    return [json.loads(answers.read_text()) for _, answers in clients]


def largest_difference(model: Any, prompt: list[int], answer: dict) -> float:
    """Compare the log-probabilities of a server's answer with those of transformers."""
    ids = torch.tensor([prompt + answer["tokens"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    expected = logprobs.gather(1, ids[0, len(prompt) :, None]).flatten()
    return (expected - torch.tensor(answer["logprobs"])).abs().max().item()


def test_two_clients_get_the_text_of_transformers(serve, environment, quickstart_model, tmp_path) -> None:
    """200 requests of 1 to 64 ids and 1 to 32 new tokens, in parallel and batched by the server."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart_model)
    model = AutoModelForCausalLM.from_pretrained(quickstart_model)
    source = tokenizer(Path(json.__file__).read_text())["input_ids"]
    rng, requests = np.random.default_rng(0), []
    for _ in range(NUM_CLIENTS * REQUESTS_OF_A_CLIENT):
        length, start = int(rng.integers(1, 65)), int(rng.integers(0, len(source) - 65))
        requests.append({"prompt": source[start : start + length], "max_tokens": int(rng.integers(1, 33))})
    with serve(quickstart_model, "--max-model-len", "128") as address:
        of_clients = [requests[:REQUESTS_OF_A_CLIENT], requests[REQUESTS_OF_A_CLIENT:]]
        answers = [answer for client in ask(environment, address, of_clients, tmp_path) for answer in client]
    assert len(answers) == len(requests)
    for request, answer in zip(requests, answers, strict=True):
        expected = transformers_answer(model, request["prompt"], request["max_tokens"])
        assert answer["tokens"] == expected.tokens
        assert answer["text"] == tokenizer.decode(expected.tokens, skip_special_tokens=True)
        assert largest_difference(model, request["prompt"], answer) < 1e-4


@pytest.mark.parametrize("setting", ["sigmoid", "gated_shared_experts"])
def test_tensor_parallel_server(setting, serve, environment, tmp_path) -> None:
    model = make_served_model(setting)
    folder = save_model(model, tmp_path / "model")
    # A server needs a tokenizer, although the prompts are ids.
    words = Tokenizer(WordLevel({str(number): number for number in range(VOCAB_SIZE)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    prompts = random_prompts(16, longest=40)
    requests = [{"prompt": prompt, "max_tokens": 8} for prompt in prompts]
    with serve(folder, "--max-model-len", "64", "--enforce-eager", "--tensor-parallel-size", "2") as address:
        (answers,) = ask(environment, address, [requests], tmp_path)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["tokens"] == transformers_answer(model, prompt, 8).tokens
        assert largest_difference(model, prompt, answer) < 1e-4
