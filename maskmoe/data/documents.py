"""Read the documents of inputs: first blocks of whole documents, then the documents of each block.

A single process reads the blocks, and many processes can parse them into documents.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from maskmoe.data.inputs import Input, find_inputs
from maskmoe.data.tables import TableBlock, read_table
from maskmoe.data.text_files import TextBlock, read_text

Block = TextBlock | TableBlock


def read_blocks(
    inputs: Sequence[Input], json_keys: Sequence[str] = ("text",), bar: tqdm | None = None
) -> Iterator[Block]:
    """Yield the blocks of all inputs in order; only one block is in memory at a time.

    Args:
        inputs: The inputs, see `find_inputs`.
        json_keys: Names of the columns to read from Parquet and Arrow files.
        bar: A progress bar to advance, see `progress_bar`.

    Raises:
        UserError: A file cannot be read, is damaged, or lacks a column of text.
    """
    advance = (tqdm(disable=True) if bar is None else bar).update
    for source in inputs:
        if source.format in ("parquet", "arrow"):
            yield from read_table(source, json_keys, advance)
        else:
            yield from read_text(source, advance)


def progress_bar(inputs: Sequence[Input], description: str) -> tqdm:
    """Return a progress bar over the bytes of all inputs on disk, which is shown if stderr is a terminal.

    The bar has no end if the size of an input is unknown.
    """
    sizes = [source.num_bytes for source in inputs]
    total = None if None in sizes else sum(size for size in sizes if size is not None)
    return tqdm(total=total, unit="B", unit_scale=True, desc=description, disable=None)


def read_documents(paths: Sequence[str | Path], json_key: str = "text") -> Iterator[str]:
    """Yield all documents of all inputs in order.

    Args:
        paths: The inputs, see `find_inputs`.
        json_key: Key of a JSON line, or name of a column, whose value is the document.

    Raises:
        UserError: An input cannot be read or parsed.
    """
    for block in read_blocks(find_inputs(paths), [json_key]):
        yield from block.documents([json_key])[0]
