r"""Encode text into a dataset that Megatron-Core trains on, or join the datasets of many machines.

The output is PREFIX_text_document.bin with the token ids, PREFIX_text_document.idx with the documents, and
PREFIX_text_document.tokenizer.json with the identity of the tokenizer.

A file that ends in .jsonl, .json or .ndjson holds one JSON object on each line, and each line is a document. A row of a
Parquet file (.parquet) is also a document. All other files are plain text: divided at --document-separator if it is
given, else one document each, or several of about 1 MiB if the file is larger. JSON lines and plain text may be
compressed with gzip or zstd. The flags have the names of Megatron-LM's.

Example:
  %(prog)s --input corpus.jsonl --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model tokenizer.model --output-prefix data/corpus --append-eod --shuffle-seed 1

  two machines, then one of them:
  %(prog)s --shard 0/2 --input *.parquet --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model tokenizer.json --output-prefix data/corpus --append-eod
  %(prog)s --shard 1/2 --input *.parquet --tokenizer-type HuggingFaceTokenizer \
    --tokenizer-model tokenizer.json --output-prefix data/corpus --append-eod
  %(prog)s --merge data/corpus-*.idx --output-prefix data/corpus_text_document --shuffle-seed 1
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_workers_argument, command_parser
from maskmoe.data.dataset_writing import IndexedDatasetWriter, merge_datasets
from maskmoe.data.inputs import FORMATS, Shard, unescape
from maskmoe.data.preprocess import preprocess
from maskmoe.data.tokenizer_record import TOKENIZER_TYPES
from maskmoe.processes.folder_lock import locked

# Flags that say how text is encoded: --merge, which encodes nothing, refuses them.
_FLAGS_OF_ENCODING = (
    *("input_format", "json_keys", "document_separator"),
    *("tokenizer_type", "tokenizer_model", "append_eod", "shard", "workers"),
)


def main() -> None:
    """Encode or join, and print the size of each dataset."""
    parser = _parser()
    settings = vars(parser.parse_args())
    started = time.perf_counter()
    shard, prefix = settings["shard"], Path(settings["output_prefix"])
    prefix = Path(shard.prefix(prefix)) if shard is not None else prefix
    # Lock the prefix before looking whether its datasets exist.
    with locked(prefix.with_name(f".{prefix.name}.lock"), prefix, "--output-prefix"):
        datasets = _encode(parser, settings) if settings["merge"] is None else _merge(parser, settings)
    seconds = time.perf_counter() - started
    for data in datasets:
        rate = data.num_tokens / seconds
        print(f"{data.prefix}: {data.num_documents} documents, {data.num_tokens} tokens, {rate:.0f} tokens/s")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__)
    sources = parser.add_mutually_exclusive_group(required=True)
    add_text_arguments(parser, ", encoded in the given order", "text; each key gets a dataset of its own", sources)
    sources.add_argument(
        "--merge",
        nargs="+",
        metavar="PREFIX",
        help="join datasets in the given order instead of encoding text: their prefixes, or their .idx files",
    )
    kind = "type of the tokenizer, as in training"
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, help=kind)
    parser.add_argument(
        "--tokenizer-model",
        metavar="MODEL",
        help="a SentencePiece .model file; or the tokenizer.json of a Hugging Face tokenizer, or the folder that holds "
        "it",
    )
    outputs = (
        "start of the output paths PREFIX_KEY_document.{bin,idx,tokenizer.json}; --merge writes "
        "PREFIX.{bin,idx,tokenizer.json}"
    )
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
    parser.add_argument(
        "--shard",
        type=Shard.parse,
        metavar="I/N",
        help="encode part I of N parts of the files, of about equal size, I from 0 to N - 1; the output prefix becomes "
        "PREFIX-I-of-N with five digits each",
    )
    add_force_argument(parser)
    add_workers_argument(parser)
    return parser


def _encode(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> Sequence[IndexedDatasetWriter]:
    for name in ("tokenizer_type", "tokenizer_model"):
        if settings[name] is None:
            parser.error(f"the following arguments are required: --{name.replace('_', '-')}")
    del settings["merge"]
    return preprocess(settings.pop("input"), **settings)


def _merge(parser: argparse.ArgumentParser, settings: dict[str, Any]) -> Sequence[IndexedDatasetWriter]:
    for name in _FLAGS_OF_ENCODING:
        if settings[name] != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is for --input, and does not apply to --merge")
    names = ("merge", "output_prefix", "shuffle_seed", "force")
    return [merge_datasets(*(settings[name] for name in names))]


def add_text_arguments(
    parser: argparse.ArgumentParser,
    purpose: str,
    meaning_of_keys: str,
    sources: argparse._ActionsContainer | None = None,
) -> None:
    """Add the flags that name texts, say how they are read, and name the keys that hold the text.

    Args:
        parser: The parser.
        purpose: Purpose of the texts, for the help.
        meaning_of_keys: Content of the keys, for the help.
        sources: Group that `--input` belongs to if another flag of the group can replace it.
    """
    (sources or parser).add_argument(
        "--input",
        nargs="+",
        required=sources is None,
        metavar="FILE",
        help=f"texts{purpose}: files, or - for standard input",
    )
    parser.add_argument(
        "--input-format",
        choices=FORMATS,
        help="format of all inputs (default: as the file's name ends; jsonl for standard input and pipes)",
    )
    keys = f"keys of the JSON objects, or names of the columns, that hold {meaning_of_keys} (default: text)"
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY", help=keys)
    parser.add_argument(
        "--document-separator",
        type=unescape,
        metavar="TEXT",
        help=r"text between two documents of a plain text file, such as '\n\n' or '<|endoftext|>'; the separator is "
        "left out (default: a file is a document)",
    )
