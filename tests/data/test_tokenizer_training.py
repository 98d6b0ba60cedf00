from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.command_lines import run_command

from maskmoe.data import tokenizer_training
from maskmoe.data.tokenizer_training import draw_lines, train_tokenizer

# SentencePiece writes a space as "▁", so this character is not kept.
CHARACTERS = st.characters(codec="utf-8", exclude_characters="▁")
TEXT = st.text(st.one_of(st.sampled_from(" \t\n\r0a"), CHARACTERS), max_size=60)


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def processor(request: pytest.FixtureRequest, texts: list[str]) -> SentencePieceProcessor:
    model = train_tokenizer(texts[-20:], 500, model_type=request.param, num_threads=1)
    return SentencePieceProcessor(model_proto=model)


@given(text=TEXT)
@example(text="def f(x):\n\treturn  x  # 1234\n\n\n")
@example(text="  a  b  \r\n <0x0A></s><unk>\0\ufeff")
def test_decoding_gives_the_text_back(processor: SentencePieceProcessor, text: str) -> None:
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert processor.unk_id() not in ids


def test_layout_of_the_vocabulary(processor: SentencePieceProcessor) -> None:
    assert processor.get_piece_size() == 500
    assert [processor.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert len(processor.encode("2024")) == 4
    assert len(processor.encode("        x")) < 5


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_seed_decides_which_lines_are_drawn(texts: list[str], model_type: str) -> None:
    settings = {"model_type": model_type, "max_lines": 300, "num_threads": 1}
    models = [train_tokenizer(texts, 400, **settings, seed=seed) for seed in (0, 0, 1)]
    assert models[0] == models[1] != models[2]


@given(num_lines=st.integers(0, 40), max_lines=st.integers(1, 30), seed=st.integers(0, 9), batch=st.integers(1, 9))
def test_drawn_lines(num_lines: int, max_lines: int, seed: int, batch: int) -> None:
    lines = [str(number) for number in range(num_lines)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_training, "_LINES_OF_BATCH", batch)
        drawn = draw_lines(iter(lines), max_lines, seed)
    assert len(set(drawn)) == len(drawn) == min(num_lines, max_lines)
    assert set(drawn) <= set(lines)
    if num_lines <= max_lines:
        assert drawn == lines


def test_lines_are_drawn_with_equal_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_training, "_LINES_OF_BATCH", 4)
    lines = [str(number) for number in range(20)]
    drawn = [int(line) for seed in range(4000) for line in draw_lines(iter(lines), 5, seed)]
    # A line is drawn in 1000 of 4000 samples, with a standard deviation of 27.
    assert abs(np.bincount(drawn, minlength=20) - 1000).max() < 5 * 27


def test_tool(jsonl: Callable, texts: list[str], tmp_path: Path) -> None:
    prefix = tmp_path / "t"
    result = run_command(
        "tokenizer", "--input", jsonl("a.jsonl", texts), "--vocab-size", 500, "--output-prefix", prefix
    )
    assert result.code == 0, result.errors
    assert result.output == f"{prefix}.model: bpe, 500 ids\n"
    processor = SentencePieceProcessor(model_file=f"{prefix}.model")
    assert all(processor.decode(processor.encode(text)) == text for text in texts if "▁" not in text)
    lines = Path(f"{prefix}.vocab").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert [line.rsplit("\t", 1)[0] for line in lines] == [processor.id_to_piece(i) for i in range(500)]
