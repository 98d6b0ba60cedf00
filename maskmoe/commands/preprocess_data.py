r"""Encode text files into a dataset that Megatron-Core trains on.

The output is PREFIX_text_document.bin with the token ids, PREFIX_text_document.idx with the documents, and
PREFIX_text_document.tokenizer.json with the identity of the tokenizer.

Input files that end in .jsonl, .json or .ndjson hold one JSON object on each line, and each line is a document. All
other files are plain text: one document each, or several of about 1 MiB if the file is larger. Both may be compressed
with gzip (.gz) or zstd (.zst). The flags have the names of Megatron-LM's.

Example:
  %(prog)s --input corpus.jsonl --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model tokenizer.model --output-prefix data/corpus --append-eod --shuffle-seed 1
"""

import time

from maskmoe import ranges
from maskmoe.commands.arguments import add_text_arguments, add_workers_argument, command_parser
from maskmoe.data.preprocess import preprocess
from maskmoe.data.tokenizer import TOKENIZER_TYPES


def main() -> None:
    """Encode the files and print the size of each dataset."""
    parser = command_parser(__doc__)
    add_text_arguments(parser, ", encoded in the given order", "text; each key gets a dataset of its own")
    kind = "type of the tokenizer, as in training"
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True, help=kind)
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="MODEL",
        help="a SentencePiece .model file; or the tokenizer.json of a Hugging Face tokenizer, or the folder that holds "
        "it",
    )
    outputs = "start of the output paths PREFIX_KEY_document.{bin,idx,tokenizer.json}"
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX", help=outputs)
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    parser.add_argument(
        "--shuffle-seed",
        type=ranges.SEED,
        metavar="S",
        help="write the documents in a random order that depends only on this seed and their number, so that the last "
        "documents, which Megatron's --split holds out, resemble the documents before them; needs twice the disk space "
        "while it runs (default: keep the order of the input)",
    )
    add_workers_argument(parser)
    settings = vars(parser.parse_args())
    started = time.perf_counter()
    datasets = preprocess(settings.pop("input"), **settings)
    seconds = time.perf_counter() - started
    for data in datasets:
        rate = data.num_tokens / seconds
        print(f"{data.prefix}: {data.num_documents} documents, {data.num_tokens} tokens, {rate:.0f} tokens/s")
