"""Train a SentencePiece tokenizer on text files: writes PREFIX.model and, to look at, PREFIX.vocab.

    python tools/train_tokenizer.py --input corpus.jsonl --vocab-size 32000 --output-prefix tokenizer

Encoding and decoding with it keeps every character and all white space; rare characters are spelled in bytes. Inputs
are as for tools/preprocess_data.py: JSON lines or plain text, plain or .gz or .zst.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from maskmoe.cli import atomic_output
from maskmoe.data.corpus import check_inputs, parse_block, read_blocks
from maskmoe.data.tokenizer_training import TokenizerTraining, train_tokenizer, vocabulary_lines


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = TokenizerTraining(vocab_size=0)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text [text]")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="V", help="number of ids, 259 of them fixed")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default=defaults.model_type, help="[bpe]")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=defaults.character_coverage,
        metavar="SHARE",
        help="share of all characters that get an id of their own, the rest is spelled in bytes [0.9995]",
    )
    parser.add_argument(
        "--max-lines",
        type=int,
        default=defaults.max_lines,
        metavar="N",
        help="train on at most N lines, drawn at random; bounds memory [10 million]",
    )
    parser.add_argument("--num-threads", type=int, default=defaults.num_threads, metavar="T", help="[16]")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the random draw [0]")
    return parser.parse_args()


def read_with_progress(paths: Sequence[Path], json_keys: Sequence[str]) -> Iterator[str]:
    """All documents under all keys, with a progress bar over the bytes read."""
    total_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for block in read_blocks(paths):
            bar.update(block.file_bytes)
            for texts in parse_block(block, json_keys):
                yield from texts
        bar.set_description("training")


def main() -> None:
    arguments = parse_arguments()
    paths = check_inputs(arguments.input)
    training = TokenizerTraining(
        arguments.vocab_size,
        arguments.model_type,
        arguments.character_coverage,
        arguments.max_lines,
        arguments.num_threads,
        arguments.seed,
    )
    prefix = arguments.output_prefix
    with atomic_output(f"{prefix}.model") as model_path, atomic_output(f"{prefix}.vocab") as vocab_path:
        model = train_tokenizer(read_with_progress(paths, arguments.json_keys), training)
        model_path.write_bytes(model)
        vocab_path.write_text("".join(vocabulary_lines(model)), encoding="utf-8")
    print(f"{prefix}.model: {arguments.model_type}, {arguments.vocab_size} ids")
