"""Log-likelihoods of texts. `tests/huggingface/test_lm_eval.py` compares them with lm-evaluation-harness."""

import json
import math
import shlex
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmoe.errors import UserError
from maskmoe.training.inference.text_scoring import Text, read_texts, token_windows, windows

TEXTS = [
    {"text": "5 17 300 4 4 80"},
    {"text": " ".join(str(7 * number % 500) for number in range(100))},  # three windows
    {"context": "12 13 14", "continuation": " 15"},
    {"context": " ".join(str(number) for number in range(60)), "continuation": " 9 9"},
    {"text": ""},
]
LAYOUTS = {
    "one rank": ("", 1),
    "uneven batches, pipeline": ("--micro-batch-size 3 --pipeline-model-parallel-size 2", 2),
    "uneven batches, context parallel": ("--micro-batch-size 3 --context-parallel-size 2", 2),
}


@pytest.fixture(scope="module")
def scores_of(workplace, start_by_name):
    """Score `TEXTS` in a layout, once for all tests."""
    checkpoints = start_by_name("start").result().checkpoints

    @cache
    def scores_of(name: str) -> dict:
        flags, ranks = LAYOUTS[name]
        folder = workplace.folder / "text_scores" / name.replace(" ", "_")
        folder.mkdir(parents=True)
        (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
        settings = f"--use-checkpoint-args --tokenizer-type NullTokenizer --vocab-size 510 {flags}"
        files = f"--eval-texts {folder}/texts.jsonl --eval-output {folder}/scores.json"
        program = ["-m", "maskmoe.training.evaluate", "--load", str(checkpoints), *shlex.split(f"{settings} {files}")]
        outcome = workplace.execute(program, folder, ranks)
        assert not any(outcome.exit_codes), outcome.report()
        return json.loads((folder / "scores.json").read_text())

    return scores_of


@pytest.mark.parametrize(
    "name", ["uneven batches, pipeline", pytest.param("uneven batches, context parallel", marks=pytest.mark.slow)]
)
def test_layouts_agree(scores_of, name):
    """Losses are fp32 sums, whose order depends on the layout."""
    for score, expected in zip(scores_of(name)["texts"], scores_of("one rank")["texts"], strict=True):
        assert score["tokens"] == expected["tokens"]
        assert math.isclose(score["log_likelihood"], expected["log_likelihood"], rel_tol=1e-6)


def test_sums(scores_of):
    result = scores_of("one rank")
    assert [score["tokens"] for score in result["texts"]] == [6, 100, 1, 2, 0]
    assert [score["bytes"] for score in result["texts"]] == [
        len(t.get("text") or t.get("continuation", "")) for t in TEXTS
    ]
    for name in ("log_likelihood", "tokens", "bytes"):
        assert result[name] == sum(score[name] for score in result["texts"])


@given(st.integers(2, 60), st.data())
def test_every_token_is_scored_once_with_all_that_fits_before_it(num_tokens, data):
    num_context = data.draw(st.integers(1, num_tokens - 1))
    length = data.draw(st.integers(1, 70))
    scored = []
    for window in windows(3, range(num_tokens), num_context, length):
        assert window.text == 3
        assert len(window.tokens) - 1 <= length
        assert list(window.tokens) == list(range(window.tokens[0], window.tokens[-1] + 1))
        assert window.tokens[0] == 0 or len(window.tokens) - 1 == length
        assert window.num_scored < len(window.tokens)
        scored += window.tokens[-window.num_scored :]
    assert scored == list(range(num_context, num_tokens))


class Letters:
    """A tokenizer of letters in which a space and the letter "b" make one token."""

    eod = 0

    @staticmethod
    def tokenize(text: str) -> list[int]:
        return [ord(letter) for letter in text.replace(" b", "B")]


def test_space_before_a_continuation_belongs_to_it():
    for context, continuation in (("a ", "b"), ("a", " b")):
        (window,) = token_windows([Text(context, continuation)], Letters, length=8)
        assert window.tokens == (ord("a"), ord("B"))
        assert window.num_scored == 1


def test_text_follows_the_end_of_a_document():
    for context in (None, ""):
        (window,) = token_windows([Text(context, "ab")], Letters, length=8)
        assert window.tokens == (0, ord("a"), ord("b"))


@pytest.mark.parametrize("length", [2, 8])
def test_white_space_is_no_context_that_predicts_a_token(length):
    """White space belongs to the continuation, and the first token of both follows the end of a document."""
    found = list(token_windows([Text("\n", "acd")], Letters, length))
    assert [token for window in found for token in window.tokens[-window.num_scored :]] == list(map(ord, "\nacd"))
    assert found[0].tokens[0] == Letters.eod
    assert all(window.num_scored < len(window.tokens) for window in found)


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ("", "--eval-texts .* holds no text"),
        ('{"text": "a"}\n{"txt": "b"}', 'line 2 of --eval-texts .* must be {"text"'),
        ('{"context": "a"}', "line 1 of .* must be"),
        ('{"text": 5}', "line 1 of .* has a text that is not a string"),
        ("[", "line 1 of .* is not JSON"),
        ("[" * 100_000, "line 1 of .* is not JSON"),
        ('["text"]', "line 1 of .* is not a JSON object"),
        (r'{"text": "\ud800"}', "line 1 of .* half of a surrogate pair"),
        (r'{"context": "\ud83d", "continuation": "\ude00"}', "line 1 of .* half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, error):
    (tmp_path / "texts.jsonl").write_text(lines)
    with pytest.raises(UserError, match=error):
        read_texts(tmp_path / "texts.jsonl")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_texts(tmp_path / "texts.jsonl")
