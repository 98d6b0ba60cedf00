"""Write a text corpus that needs no download: sources and documentation of the installed Python and its packages.

    python tools/make_corpus.py --output corpus.jsonl

Writes JSON lines {"text": …, "path": …}, one file each. The documents are shuffled, so that the last ones, which
Megatron's --split takes for validation, are like the others.
"""

import argparse
import json
import random

from maskmoe.cli import atomic_output
from maskmoe.data.default_corpus import default_corpus
from maskmoe.errors import UserError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--max-bytes",
        type=int,
        default=32 << 20,
        metavar="N",
        help="text bytes at most, standard library first [32 MiB]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle [0]")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    with atomic_output(arguments.output) as path, open(path, "w", encoding="utf-8") as stream:
        documents = list(default_corpus(arguments.max_bytes))
        if not documents:
            raise UserError(f"no text of at most {arguments.max_bytes} bytes found in this Python; raise --max-bytes")
        random.Random(arguments.seed).shuffle(documents)
        for document in documents:
            stream.write(json.dumps({"text": document.text, "path": document.path}, ensure_ascii=False) + "\n")
    size = sum(len(document.text.encode()) for document in documents)
    print(f"{arguments.output}: {len(documents)} documents, {size / 1e6:.1f} MB of text")
