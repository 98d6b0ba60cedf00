"""Encode text files into a dataset that Megatron-Core trains on (PREFIX_text_document.bin and .idx).

    python tools/preprocess_data.py --input corpus.jsonl --tokenizer-type SentencePieceTokenizer \\
        --tokenizer-model tokenizer.model --output-prefix data/corpus --workers 8 --append-eod

Inputs ending in .jsonl, .json or .ndjson hold one JSON object a line; all other files are plain text, one document each
(several where a file is larger than 1 MB). Both may be compressed (.gz, .zst). Flags have Megatron-LM's names.
"""

import argparse

from maskmoe.data.preprocess import available_cores, preprocess
from maskmoe.data.tokenizer import TOKENIZER_TYPES


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="text files, in this order")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys that hold text [text]")
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="MODEL",
        help="SentencePiece .model file; or tokenizer.json of a Hugging Face tokenizer, or the folder that holds it",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="writes PREFIX_KEY_document.{bin,idx,tokenizer.json}"
    )
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-text id")
    parser.add_argument(
        "--workers", type=int, default=available_cores(), metavar="W", help="processes that encode [one per core]"
    )
    arguments = parser.parse_args()
    if arguments.workers < 1:
        parser.error(f"--workers must be at least 1, not {arguments.workers}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    summaries = preprocess(
        arguments.input,
        arguments.tokenizer_type,
        arguments.tokenizer_model,
        arguments.output_prefix,
        arguments.json_keys,
        arguments.append_eod,
        arguments.workers,
    )
    for summary in summaries:
        rate = summary.num_tokens / summary.seconds
        print(f"{summary.prefix}: {summary.num_documents} documents, {summary.num_tokens} tokens, {rate:.0f} tokens/s")
