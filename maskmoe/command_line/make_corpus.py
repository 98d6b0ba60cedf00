"""Write a text corpus: sources and documentation of the installed Python and its packages.

The output holds one JSON object {"text": …, "path": …} on each line, one line for each file. Files that are mostly
numbers, generated tables or larger than 32 KiB are left out. The text differs between machines.

The lines are shuffled, so that the last documents, which are usually held out for validation, resemble the documents
before them.

Example:
  %(prog)s --output corpus.jsonl --max-bytes 12000000
"""

import json
import random
from pathlib import Path

from maskmoe.arguments import ranges
from maskmoe.arguments.commands import add_force_argument, add_seed_argument, command_parser
from maskmoe.arguments.parser import add_option
from maskmoe.data.default_corpus import default_corpus
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import atomic_output


def main() -> None:
    """Write the corpus and print its size."""
    parser = command_parser(__doc__)
    add_option(parser, "--output FILE.jsonl", "file to write", Path, required=True)
    limit = "largest size of the text in bytes; the standard library comes first (default: %(default)s, 32 MiB)"
    parser.add_argument("--max-bytes", type=ranges.COUNT, default=32 << 20, metavar="N", help=limit)
    add_seed_argument(parser, "the order of the documents")
    add_force_argument(parser)
    arguments = parser.parse_args()
    check_outputs([arguments.output], force=arguments.force)
    documents = list(default_corpus(arguments.max_bytes))
    if not documents:
        raise UserError(f"no text of at most {arguments.max_bytes} bytes found in this Python; raise --max-bytes")
    random.Random(arguments.seed).shuffle(documents)
    with atomic_output(arguments.output) as path, open(path, "w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps(document, ensure_ascii=False) + "\n")
    size = sum(len(document["text"].encode()) for document in documents)
    print(f"{arguments.output}: {len(documents)} documents, {size / 1e6:.1f} MB of text")
