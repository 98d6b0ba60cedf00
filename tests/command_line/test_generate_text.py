"""`maskmoe generate`: its texts are those of Megatron's model, and texts of a batch are those of single prompts."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from support.converted_models import load_converted_model, logits_of_megatron
from support.paths import EXPORTED_MODEL as MODEL
from support.tiny_maskmoe import make_model
from transformers import AutoTokenizer

from maskmoe.checkpoint.series import RELEASE
from maskmoe.command_line import generate_text
from maskmoe.conversion.convert import huggingface_to_megatron
from maskmoe.conversion.settings import Settings
from maskmoe.errors import UserError

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 1, 4, 1], [2, 7]]


class TokenIds:
    """Stands in for a tokenizer: a text consists of token ids, separated by spaces."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*map(int, text.split())]}

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


def continuation(ends: object = None, temperature: float = 0) -> generate_text.Continuation:
    torch.manual_seed(0)
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that texts differ
    model.generation_config.eos_token_id = ends
    arguments = Namespace(load="model", max_new_tokens=8, temperature=temperature, top_k=50)
    return generate_text.Continuation(arguments, TokenIds(), model)


def test_batch_equals_single_prompts():
    continued = continuation()
    texts = continued.of(PROMPTS)
    assert texts == [text for prompt in PROMPTS for text in continued.of([prompt])]
    assert [text.split()[: len(prompt)] for text, prompt in zip(texts, PROMPTS, strict=True)] == [
        [str(token) for token in prompt] for prompt in PROMPTS
    ]
    assert {len(text.split()) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)} == {8}
    assert len({tuple(text.split()[-4:]) for text in texts}) > 1


def test_texts_of_a_batch_end_on_their_own():
    """The end of one text is another's ordinary token."""
    first = continuation().of(PROMPTS[:1])[0].split()
    end = int(first[len(PROMPTS[0]) + 2])
    continued = continuation(ends=[end])
    texts = continued.of(PROMPTS)
    assert texts == [text for prompt in PROMPTS for text in continued.of([prompt])]
    assert str(end) not in texts[0].split()[len(PROMPTS[0]) :]
    assert len(texts[0].split()) <= len(PROMPTS[0]) + 2


def test_smallest_temperature_takes_the_most_probable():
    assert continuation(temperature=1e-42).of(PROMPTS) == continuation().of(PROMPTS)


def generate(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["maskmoe generate", *words.split()])
    generate_text.main()


def test_prompts_of_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os", "id": 1}\n{"prompt": "def f(x):\\n    return"}\n')
    words = f"--load {MODEL} --prompts-file {tmp_path}/prompts.jsonl --temperature 0 --max-new-tokens 4"
    generate(monkeypatch, f"{words} --output {tmp_path}/texts.jsonl")
    first, second = map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines())
    assert first.keys() == {"prompt", "text"}
    assert first["text"].startswith("import os")
    assert second["text"].startswith("def f(x):\n    return")
    assert capsys.readouterr().out == (tmp_path / "texts.jsonl").read_text()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model as the checkpoint `release`."""
    folder = tmp_path_factory.mktemp("generation") / "checkpoints"
    tokenizer = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(MODEL)}
    assert huggingface_to_megatron(Settings(load=MODEL, save=folder, **tokenizer)) == []
    return folder


def test_text_of_a_checkpoint_is_that_of_megatrons_model(checkpoints, one_rank, tmp_path, monkeypatch, capsys):
    """Megatron computes the whole text again for each token, transformers keeps keys and values."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    generate(monkeypatch, f"--load {checkpoints} --prompt import --temperature 0 --max-new-tokens 24")
    printed = capsys.readouterr()
    assert f"loading: {RELEASE} in {checkpoints}\n" in printed.err
    assert not os.listdir(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(checkpoints / "tokenizer")
    model, ids = load_converted_model(checkpoints, [])[0], tokenizer("import")["input_ids"]
    for _ in range(24):
        ids.append(int(logits_of_megatron(model, torch.tensor([ids]))[0, -1, : len(tokenizer)].argmax()))
    assert printed.out == tokenizer.decode(ids, skip_special_tokens=True) + "\n"
    assert len(set(ids)) > 4


def test_model_without_a_tokenizer_is_refused(checkpoints, monkeypatch):
    with pytest.raises(UserError, match="has no tokenizer"):
        generate(monkeypatch, f"--load {checkpoints / RELEASE} --tokenizer-type NullTokenizer --prompt 17")


@pytest.mark.parametrize("flag", ["--ckpt-step 3", "--tokenizer-type NullTokenizer", "--routing-mask mask"])
def test_flag_of_checkpoints_beside_an_exported_model(monkeypatch, flag):
    with pytest.raises(UserError, match=f"{flag.split()[0]} is for checkpoints of Megatron, but --load .* exported"):
        generate(monkeypatch, f"--load {MODEL} --prompt import {flag}")
