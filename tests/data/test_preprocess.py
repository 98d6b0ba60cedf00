"""Makes datasets from text files as a user does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from sentencepiece import SentencePieceProcessor
from support.system import run_maskmoe
from tokenizers import Tokenizer

from maskmoe.data.indexed_dataset import open_tokens
from maskmoe.data.preprocess import preprocess
from maskmoe.data.tokenizer import load_tokenizer
from maskmoe.data.tokenizer_record import read_tokenizer_record
from maskmoe.errors import UserError


def content(prefix: Path) -> list[bytes]:
    """Return the bytes of both files of a dataset."""
    return [Path(f"{prefix}_text_document.{suffix}").read_bytes() for suffix in ("bin", "idx")]


def sentencepiece_arguments(model: Path, prefix: Path, *inputs: Path) -> list[object]:
    return [
        *("--input", *inputs, "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        *("--output-prefix", prefix, "--append-eod"),
    ]


def write_as_megatron(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    """Write a dataset with Megatron's builder, as Megatron's `tools/preprocess_data.py` does."""
    builder = IndexedDatasetBuilder(f"{prefix}_text_document.bin", DType.optimal_dtype(vocab_size))
    for ids in documents:
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{prefix}_text_document.idx")


def test_tool_gives_megatrons_bytes_for_any_number_of_workers(
    jsonl: Callable, texts: list[str], sentencepiece_model: Path, tmp_path: Path
) -> None:
    # The input makes several tasks, which 3 workers may finish in another order.
    documents = [*texts * 3, *texts[-6:] * 50]
    path = jsonl("a.jsonl", documents)
    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    ids = [processor.encode(text) for text in documents]
    write_as_megatron(tmp_path / "megatron", [[*i, 2] if i else [] for i in ids], vocab_size=600)
    for workers in (1, 3):
        prefix = tmp_path / f"w{workers}"
        result = run_maskmoe(
            "preprocess", *sentencepiece_arguments(sentencepiece_model, prefix, path), "--workers", workers
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"{prefix}_text_document: {len(documents)} documents, ")
        assert content(prefix) == content(tmp_path / "megatron")
        assert read_tokenizer_record(f"{prefix}_text_document") == (
            load_tokenizer("SentencePieceTokenizer", sentencepiece_model).record()
        )


def test_huggingface(jsonl: Callable, texts: list[str], huggingface_folder: Path, tmp_path: Path) -> None:
    path = jsonl("a.jsonl", texts)
    preprocess([path], "HuggingFaceTokenizer", huggingface_folder, tmp_path / "ours", append_eod=True, workers=2)
    tokenizer = Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    ids = [[*tokenizer.encode(text).ids, tokenizer.token_to_id("<end>")] for text in texts]
    write_as_megatron(tmp_path / "megatron", ids, tokenizer.get_vocab_size())
    assert content(tmp_path / "ours") == content(tmp_path / "megatron")


def test_several_keys_and_no_eod(sentencepiece_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"question {i}", "a": f"answer {i}"}) + "\n" for i in range(10)))
    summaries = preprocess([path], "SentencePieceTokenizer", sentencepiece_model, tmp_path / "out", ["q", "a"])
    processor = SentencePieceProcessor(model_file=str(sentencepiece_model))
    for summary, word in zip(summaries, ("question", "answer"), strict=True):
        assert summary.prefix == f"{tmp_path}/out_{word[0]}_document"
        expected = [token for i in range(10) for token in processor.encode(f"{word} {i}")]
        assert open_tokens(summary.prefix).tolist() == expected
        assert (summary.num_documents, summary.num_tokens) == (10, len(expected))


def test_bad_input_keeps_the_earlier_dataset(
    jsonl: Callable, texts: list[str], sentencepiece_model: Path, tmp_path: Path
) -> None:
    prefix = tmp_path / "out"
    good = jsonl("good.jsonl", texts)
    preprocess([good], "SentencePieceTokenizer", sentencepiece_model, prefix, append_eod=True)
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(good.read_bytes() * 3 + b'{"text": \n')
    empty = jsonl("empty.jsonl", ["", ""])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    line = 3 * len(texts) + 1
    for path, settings, message in (
        (bad, {"workers": 1}, f"{bad}: line {line}: invalid JSON"),
        (bad, {"workers": 3}, f"{bad}: line {line}: invalid JSON"),
        (bad, {"shuffle_seed": 1}, f"{bad}: line {line}: invalid JSON"),
        (empty, {}, f"no text under 'text' in {empty}"),
        (tmp_path / "missing.jsonl", {}, "missing.jsonl does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([path], "SentencePieceTokenizer", sentencepiece_model, prefix, force=True, **settings)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_one_command_at_a_time_writes_to_a_prefix(
    jsonl: Callable, sentencepiece_model: Path, tmp_path: Path
) -> None:
    """The first one reads a pipe until the test closes it; both would succeed, and the second replace the first's."""
    os.mkfifo(tmp_path / "pipe")
    corpus = jsonl("corpus.jsonl", ["one", "two"])
    program = [sys.executable, "-m", "maskmoe", "preprocess", "--workers", "1", "--input-format", "jsonl"]
    words = [str(word) for word in sentencepiece_arguments(sentencepiece_model, tmp_path / "o", tmp_path / "pipe")]
    with subprocess.Popen([*program, *words], cwd=tmp_path) as first, open(tmp_path / "pipe", "wb") as pipe:
        second = run_maskmoe("preprocess", *sentencepiece_arguments(sentencepiece_model, tmp_path / "o", corpus))
        assert second.returncode == 2
        assert f"process {first.pid} on host" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        pipe.write(corpus.read_bytes())
        pipe.close()
        assert first.wait(60) == 0
    assert sorted(path.name for path in tmp_path.glob("*o*lock")) == []
