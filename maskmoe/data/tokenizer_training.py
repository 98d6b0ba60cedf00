"""Train a SentencePiece tokenizer for language modelling."""

import io
import re
import signal
from collections.abc import Iterable, Iterator
from itertools import batched, islice

import numpy as np

from maskmoe.errors import UserError
from maskmoe.processes.interruption import handling_signals
from maskmoe.processes.signals import SIGNALS_THAT_END_TOOLS

# The trainer takes lines and refuses lines with tabs, which it uses itself. "\n" and "\t" become byte tokens instead.
_SEPARATORS = re.compile(r"[\n\t]")
_MAX_LINE_CHARACTERS = 1 << 12
_RARE_CHARACTER = "▅"  # stands for rare characters in the trainer, which skips lines that hold it
_LEAST_LIMIT = 101  # the smallest limit of lines that the trainer takes
_LINES_OF_BATCH = 1 << 16


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    max_lines: int = 10_000_000,
    num_threads: int = 16,
    seed: int = 0,
) -> bytes:
    """Train on the documents and return a serialized SentencePiece model.

    The tokenizer loses no text: nothing is normalised, white space is kept, and characters without an id are encoded
    as bytes. Decoding therefore returns the encoded text, with one exception: "▁" (U+2581), which SentencePiece uses
    for a space, becomes a space. Ids are: 0 unknown (never used), 1 begin of text, 2 end of text, 3 to 258 bytes. Each
    digit is a token of its own. The result depends on the documents and the settings only.
    A signal such as Ctrl-C ends the process at once.

    Args:
        documents: The text.
        vocab_size: Number of ids, including 3 special ids and 256 ids for bytes.
        model_type: `bpe` or `unigram`.
        character_coverage: Share of the characters in the text that are covered by characters with their own id.
            Other characters are encoded as bytes.
        max_lines: Upper limit of the lines to train on. If the text has more lines, a random sample is used.
        num_threads: Threads of the library. The tokens depend on their number.
        seed: Seed of the random sample.

    Raises:
        UserError: The text is empty or too small for the vocabulary, or the vocabulary is too small for the text.
    """
    import sentencepiece

    # The trainer's own sample does not depend on a seed, and differs between processes.
    lines = draw_lines((line for document in documents for line in _cut_into_lines(document)), max_lines, seed)
    if not lines:
        raise UserError("the input holds no text to train a tokenizer on")
    lines.reverse()
    model = io.BytesIO()
    try:
        # The trainer computes for minutes without a return to Python, which therefore could not handle signals.
        with handling_signals(SIGNALS_THAT_END_TOOLS, signal.SIG_DFL):
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(lines.pop() for _ in range(len(lines))),  # the trainer copies a line: free ours
                model_writer=model,
                vocab_size=vocab_size,
                model_type=model_type,
                character_coverage=character_coverage,
                input_sentence_size=max(max_lines, _LEAST_LIMIT),
                shuffle_input_sentence=True,
                max_sentence_length=4 * _MAX_LINE_CHARACTERS,
                num_threads=num_threads,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                minloglevel=2,
            )
    except RuntimeError as error:
        raise UserError(f"this text does not suit --vocab-size {vocab_size}: SentencePiece says: {error}") from error
    return model.getvalue()


def draw_lines(lines: Iterator[str], max_lines: int, seed: int) -> list[str]:
    """Return all lines in order if there are at most `max_lines`, else a uniform random sample of `max_lines` lines.

    Memory holds only the lines that are drawn (reservoir sampling), so the number of all lines may be unknown.
    """
    drawn = list(islice(lines, max_lines))
    generator, num_lines = np.random.default_rng(seed), max_lines
    for batch in batched(lines, _LINES_OF_BATCH):
        # Line i, counted from 0, replaces a drawn line with probability max_lines / (i + 1).
        places = generator.integers(np.arange(num_lines, num_lines + len(batch)), endpoint=True)
        for place, line in zip(places.tolist(), batch, strict=True):
            if place < max_lines:
                drawn[place] = line
        num_lines += len(batch)
    return drawn


def _cut_into_lines(document: str) -> Iterator[str]:
    """Yield the lines of a document in pieces, without the pieces that the trainer skips."""
    for line in _SEPARATORS.split(document):
        for begin in range(0, len(line), _MAX_LINE_CHARACTERS):
            piece = line[begin : begin + _MAX_LINE_CHARACTERS]
            if piece.rstrip("\r") and _RARE_CHARACTER not in piece:
                yield piece


def vocabulary_lines(model: bytes) -> Iterator[str]:
    """Yield the lines of a model's `.vocab` file as SentencePiece's trainer writes them: piece, tab, score."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for piece_id in range(processor.get_piece_size()):
        yield f"{processor.id_to_piece(piece_id)}\t{processor.get_score(piece_id):g}\n"
