"""Train a SentencePiece tokenizer on text files.

The output is PREFIX.model, the tokenizer, and PREFIX.vocab, a readable list of its tokens. The tokenizer keeps every
character and all white space. Characters that are too rare for a token of their own are encoded as bytes.

Input files that end in .jsonl, .json or .ndjson hold one JSON object on each line; all other files are plain text. Both
may be compressed with gzip (.gz) or zstd (.zst).

Example:
  %(prog)s --input corpus.jsonl --vocab-size 32000 --output-prefix tokenizer
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from maskmoe import ranges
from maskmoe.cli import atomic_output
from maskmoe.commands.arguments import add_seed_argument, add_text_arguments, command_parser
from maskmoe.data.corpus import check_inputs, parse_block, progress_bar, read_blocks
from maskmoe.data.tokenizer_training import train_tokenizer, vocabulary_lines


def read_with_progress(paths: Sequence[Path], json_keys: Sequence[str]) -> Iterator[str]:
    """Yield all documents under all keys while a progress bar shows the bytes that were read."""
    with progress_bar(paths, "reading") as bar:
        for block in read_blocks(paths, bar):
            for texts in parse_block(block, json_keys):
                yield from texts
        bar.set_description("training")


def main() -> None:
    """Train the tokenizer and write its files."""
    parser = command_parser(__doc__)
    add_text_arguments(parser, " to train on", "the text")
    size = "number of token ids, including 3 special ids and 256 ids for bytes"
    parser.add_argument("--vocab-size", type=ranges.TOKENIZER_SIZE, required=True, metavar="V", help=size)
    outputs = "path of the output files without .model and .vocab"
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help=outputs)
    algorithm = "algorithm of the tokenizer (default: %(default)s)"
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help=algorithm)
    parser.add_argument(
        "--character-coverage",
        type=ranges.CHARACTER_COVERAGE,
        default=0.9995,
        metavar="SHARE",
        help="share of the characters in the text (0.98 to 1) that is covered by characters with a token of their own; "
        "other characters are encoded as bytes (default: %(default)s)",
    )
    lines = "train on at most N lines, drawn at random; limits the memory (default: %(default)s)"
    parser.add_argument("--max-lines", type=ranges.LINES, default=10_000_000, metavar="N", help=lines)
    threads = "threads (default: %(default)s)"
    parser.add_argument("--num-threads", type=ranges.THREADS, default=16, metavar="T", help=threads)
    add_seed_argument(parser, "the drawn lines")
    settings = vars(parser.parse_args())
    prefix = settings.pop("output_prefix")
    documents = read_with_progress(check_inputs(settings.pop("input")), settings.pop("json_keys"))
    with atomic_output(f"{prefix}.model") as model_path, atomic_output(f"{prefix}.vocab") as vocab_path:
        model = train_tokenizer(documents, **settings)
        model_path.write_bytes(model)
        vocab_path.write_text("".join(vocabulary_lines(model)), encoding="utf-8")
    print(f"{prefix}.model: {settings['model_type']}, {settings['vocab_size']} ids")
