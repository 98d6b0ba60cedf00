"""Train a SentencePiece tokenizer on text files.

The output is PREFIX.model, the tokenizer, and PREFIX.vocab, a readable list of its tokens. The tokenizer keeps every
character and all white space. Characters that are too rare for a token of their own are encoded as bytes.

Input files that end in .jsonl, .json or .ndjson hold one JSON object on each line; all other files are plain text. Both
may be compressed with gzip (.gz) or zstd (.zst).
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from maskmoe.cli import atomic_output
from maskmoe.data.corpus import check_inputs, parse_block, read_blocks
from maskmoe.data.tokenizer_training import TokenizerTraining, train_tokenizer, vocabulary_lines

_EPILOG = """\
example:
  %(prog)s --input corpus.jsonl --vocab-size 32000 --output-prefix tokenizer
"""


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = TokenizerTraining(vocab_size=0)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files to train on")
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the JSON objects that hold the text (default: text)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="V",
        help="number of token ids, including 3 special ids and 256 ids for bytes",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path of the output files without .model and .vocab"
    )
    parser.add_argument(
        "--model-type",
        choices=("bpe", "unigram"),
        default=defaults.model_type,
        help="algorithm of the tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=defaults.character_coverage,
        metavar="SHARE",
        help="share of the characters in the text (0 to 1) that is covered by characters with a token of their own; "
        "other characters are encoded as bytes (default: %(default)s)",
    )
    parser.add_argument(
        "--max-lines",
        type=int,
        default=defaults.max_lines,
        metavar="N",
        help="train on at most N lines, drawn at random; limits the memory (default: %(default)s)",
    )
    parser.add_argument(
        "--num-threads", type=int, default=defaults.num_threads, metavar="T", help="threads (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, metavar="S", help="seed of the drawn lines (default: %(default)s)"
    )
    return parser.parse_args()


def read_with_progress(paths: Sequence[Path], json_keys: Sequence[str]) -> Iterator[str]:
    """Yield all documents under all keys while a progress bar shows the bytes that were read."""
    total_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for block in read_blocks(paths):
            bar.update(block.file_bytes)
            for texts in parse_block(block, json_keys):
                yield from texts
        bar.set_description("training")


def main() -> None:
    """Train the tokenizer and write its files."""
    arguments = parse_arguments()
    paths = check_inputs(arguments.input)
    training = TokenizerTraining(
        vocab_size=arguments.vocab_size,
        model_type=arguments.model_type,
        character_coverage=arguments.character_coverage,
        max_lines=arguments.max_lines,
        num_threads=arguments.num_threads,
        seed=arguments.seed,
    )
    prefix = arguments.output_prefix
    with atomic_output(f"{prefix}.model") as model_path, atomic_output(f"{prefix}.vocab") as vocab_path:
        model = train_tokenizer(read_with_progress(paths, arguments.json_keys), training)
        model_path.write_bytes(model)
        vocab_path.write_text("".join(vocabulary_lines(model)), encoding="utf-8")
    print(f"{prefix}.model: {arguments.model_type}, {arguments.vocab_size} ids")
