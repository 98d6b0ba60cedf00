"""Train a SentencePiece tokenizer on text.

The output is PREFIX.model, the tokenizer, and PREFIX.vocab, a readable list of its tokens. The tokenizer keeps every
character and all white space. Characters that are too rare for a token of their own are encoded as bytes.

The command reads what `maskmoe preprocess` reads: JSON lines (.jsonl, .json, .ndjson), Parquet (.parquet) and plain
text, pipes and standard input.

Example:
  %(prog)s --input corpus.jsonl --vocab-size 32000 --output-prefix tokenizer
"""

from collections.abc import Iterator, Sequence

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.command_line.preprocess_data import add_text_arguments
from maskmoe.data.documents import progress_bar, read_blocks
from maskmoe.data.inputs import Input, find_inputs
from maskmoe.data.tokenizer_training import train_tokenizer, vocabulary_lines
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output


def read_with_progress(inputs: Sequence[Input], json_keys: Sequence[str]) -> Iterator[str]:
    """Yield all documents under all keys while a progress bar shows the bytes that were read."""
    with progress_bar(inputs, "reading") as bar:
        for block in read_blocks(inputs, json_keys, bar):
            for texts in block.documents(json_keys):
                yield from texts
        bar.set_description("training")


def main() -> None:
    """Train the tokenizer and write its files."""
    parser = command_parser(__doc__)
    add_text_arguments(parser, " to train on", "the text")
    size = "number of token ids, including 3 special ids and 256 ids for bytes"
    add_option(parser, "--vocab-size V", size, ranges.TOKENIZER_SIZE, required=True)
    add_option(parser, "--output-prefix PREFIX", "path of the output files without .model and .vocab", required=True)
    add_option(parser, "--model-type", "algorithm of the tokenizer", choices=("bpe", "unigram"), default="bpe")
    covered = (
        "share of the characters in the text (0.98 to 1) that is covered by characters with a token of their own; "
    )
    covered += "other characters are encoded as bytes"
    add_option(parser, "--character-coverage SHARE", covered, ranges.CHARACTER_COVERAGE, default=0.9995)
    lines = "train on at most N lines, drawn at random; limits the memory"
    add_option(parser, "--max-lines N", lines, ranges.COUNT, default=10_000_000)
    workers = "threads that train; another number gives slightly different tokens"
    add_option(parser, "--workers W", workers, ranges.THREADS, default=16, dest="num_threads")
    add_seed_argument(parser, "the drawn lines")
    add_force_argument(parser)
    settings = vars(parser.parse_args())
    prefix, names = settings.pop("output_prefix"), settings.pop("input")
    inputs = find_inputs(names, settings.pop("input_format"), settings.pop("document_separator"))
    outputs = [f"{prefix}.model", f"{prefix}.vocab"]
    check_outputs(outputs, [*names, *(source.path for source in inputs)], settings.pop("force"))
    # No output is open during the training, which a signal ends at once.
    model = train_tokenizer(read_with_progress(inputs, settings.pop("json_keys")), **settings)
    with atomic_output(outputs[0]) as model_path, atomic_output(outputs[1]) as vocab_path:
        model_path.write_bytes(model)
        vocab_path.write_text("".join(vocabulary_lines(model)), encoding="utf-8")
    print(f"{prefix}.model: {settings['model_type']}, {settings['vocab_size']} ids")
