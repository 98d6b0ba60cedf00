"""Measure `maskmoe preprocess`, from start to end, against the tokenizer library's own batch encoding in memory.

Both use all cores. The text comes from the installed Python, as in `maskmoe corpus`. The tokenizers are trained on
a part of the text.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import harness
import pyarrow.parquet
import sentencepiece
import tokenizers

from maskmoe.data.default_corpus import default_corpus
from maskmoe.data.parallel import available_cores
from maskmoe.data.tokenizer_training import train_tokenizer
from maskmoe.processes.run_tool import run_tool

TRAINING_DOCUMENTS = 400
SEPARATOR = "<|endoftext|>"


def write_corpus(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def preprocessing(corpus: Path, tokenizer_type: str, model: Path, *flags: str) -> Callable[[], None]:
    command = [
        *(sys.executable, "-m", "maskmoe", "preprocess", "--input", corpus, *flags),
        *("--tokenizer-type", tokenizer_type, "--tokenizer-model", model, "--output-prefix", corpus.parent / "out"),
        *("--workers", str(available_cores()), "--force"),
    ]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def sentencepiece_cases(corpus: Path, texts: list[str], vocab_size: int) -> Iterator[harness.Case]:
    """Yield a case for each format of the same documents."""
    model = corpus.parent / "sentencepiece.model"
    model.write_bytes(train_tokenizer(texts[:TRAINING_DOCUMENTS], vocab_size))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))

    def encode() -> list[list[int]]:
        return processor.encode(texts, num_threads=available_cores())

    millions = sum(map(len, encode())) / 1e6
    parquet, plain = corpus.with_suffix(".parquet"), corpus.with_suffix(".txt")
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), parquet, compression="zstd")
    plain.write_text(SEPARATOR.join(texts), encoding="utf-8")
    inputs = {"": (corpus,), ", Parquet": (parquet,), ", separator": (plain, "--document-separator", SEPARATOR)}
    for name, (path, *flags) in inputs.items():
        ours = preprocessing(path, "SentencePieceTokenizer", model, *flags)
        yield harness.Case(
            f"preprocess SentencePiece{name}",
            "M tokens/s",
            harness.rate(ours, millions),
            harness.rate(encode, millions),
        )


def huggingface_case(corpus: Path, texts: list[str], vocab_size: int) -> harness.Case:
    model = corpus.parent / "tokenizer.json"
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts[:TRAINING_DOCUMENTS], vocab_size, show_progress=False)
    tokenizer.save(str(model))

    def encode() -> list[tokenizers.Encoding]:
        return tokenizer.encode_batch(texts)

    millions = sum(map(len, encode())) / 1e6
    ours = preprocessing(corpus, "HuggingFaceTokenizer", model)
    return harness.Case(
        "preprocess Hugging Face", "M tokens/s", harness.rate(ours, millions), harness.rate(encode, millions)
    )


def startup_case(folder: Path) -> harness.Case:
    """Measure the encoding of one short document; the baseline is a Python process that imports the same libraries."""
    corpus, model = folder / "short.jsonl", folder / "sentencepiece.model"
    write_corpus(corpus, ["hello"])
    command = [sys.executable, "-c", "import numpy, sentencepiece, tqdm"]
    ours = preprocessing(corpus, "SentencePieceTokenizer", model)
    baseline = harness.seconds(lambda: subprocess.run(command, check=True))
    return harness.Case("preprocess start-up", "s", harness.seconds(ours), baseline)


def main() -> None:
    parser = harness.make_parser(__doc__, repeats=5)
    parser.add_argument(
        "--megabytes", type=int, default=32, metavar="M", help="size of the text in MB (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=32000,
        metavar="V",
        help="number of ids of the tokenizers (default: %(default)s)",
    )
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # for the baseline; the tool sets the variable itself
    texts = [document["text"] for document in default_corpus(arguments.megabytes * 10**6)]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        write_corpus(corpus, texts)
        cases = [
            *sentencepiece_cases(corpus, texts, arguments.vocab_size),
            huggingface_case(corpus, texts, arguments.vocab_size),
            startup_case(Path(folder)),
        ]
        harness.report(harness.run(cases, arguments.repeats), arguments.json)


if __name__ == "__main__":
    run_tool(main)
