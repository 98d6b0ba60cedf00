"""`maskmoe sample`: texts of a batch equal the texts of single prompts."""

import json
import sys
from argparse import Namespace

import torch
from support.paths import EXPORTED_MODEL as MODEL
from support.tiny_maskmoe import make_model

from maskmoe.command_line import sample_text

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [3, 1, 4, 1], [2, 7]]


class Numbers:
    """A tokenizer whose text is the ids."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, tokens))


def continuation(ends: object = None, temperature: float = 0) -> sample_text.Continuation:
    torch.manual_seed(0)
    model = make_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # so that texts differ
    model.generation_config.eos_token_id = ends
    return sample_text.Continuation(Namespace(max_new_tokens=8, temperature=temperature, top_k=50), Numbers(), model)


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


def test_prompts_of_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import os", "id": 1}\n{"prompt": "def f(x):\\n    return"}\n')
    words = f"sample --model {MODEL} --prompts-file {tmp_path}/prompts.jsonl --temperature 0 --max-new-tokens 4"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--output", str(tmp_path / "texts.jsonl")])
    sample_text.main()
    first, second = map(json.loads, (tmp_path / "texts.jsonl").read_text().splitlines())
    assert first.keys() == {"prompt", "id", "text"}
    assert first["text"].startswith("import os")
    assert second["text"].startswith("def f(x):\n    return")
    assert capsys.readouterr().out == (tmp_path / "texts.jsonl").read_text()
