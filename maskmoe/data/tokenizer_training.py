"""Train a SentencePiece tokenizer for language modelling."""

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import sentencepiece

from maskmoe.errors import UserError

# "\n" and "\t" become byte tokens: the trainer takes lines, and refuses those with tabs, which it uses itself.
_SEPARATORS = re.compile(r"[\n\t]")
_MAX_LINE_CHARACTERS = 1 << 12
_TOO_SMALL_TEXT = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
_TOO_SMALL_VOCABULARY = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class TokenizerTraining:
    """How to train.

    Attributes:
        vocab_size: number of ids, with the 3 special ones and the 256 bytes.
        model_type: `bpe` or `unigram`.
        character_coverage: share of the characters in the text that get an id; the rest are spelled in bytes.
        max_lines: train on at most so many lines, drawn at random when there are more.
        num_threads: used by the library.
        seed: of the draw.
    """

    vocab_size: int
    model_type: str = "bpe"
    character_coverage: float = 0.9995
    max_lines: int = 10_000_000
    num_threads: int = 16
    seed: int = 0


def train_tokenizer(documents: Iterable[str], training: TokenizerTraining) -> bytes:
    """Train on the documents and return a serialized SentencePiece model.

    No text is lost: nothing is normalised, white space is kept as it is, and what has no id of its own is spelled in
    bytes. So decoding gives back what was encoded, except that "▁" (U+2581), SentencePiece's own sign for a space,
    comes back as a space. Ids: 0 unknown (never used), 1 begin, 2 end of text, 3 to 258 bytes. Digits stand alone.
    The result depends on the documents and settings only.

    Raises:
        UserError: the text is empty or too small for the vocabulary, or the vocabulary too small for the text.
    """
    sentencepiece.set_random_generator_seed(training.seed)
    model = io.BytesIO()
    lines = _LineReader(documents)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=training.vocab_size,
            model_type=training.model_type,
            character_coverage=training.character_coverage,
            input_sentence_size=training.max_lines,
            shuffle_input_sentence=True,
            max_sentence_length=4 * _MAX_LINE_CHARACTERS,
            num_threads=training.num_threads,
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
        raise lines.error or _explain(error, training.vocab_size, lines.count) from error
    return model.getvalue()


class _LineReader:
    """Lines of documents as the trainer wants them; keeps an exception of theirs, which the trainer would swallow."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self.count = 0
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for document in self._documents:
                for line in _SEPARATORS.split(document):
                    for begin in range(0, len(line), _MAX_LINE_CHARACTERS):
                        self.count += 1
                        yield line[begin : begin + _MAX_LINE_CHARACTERS]
        except Exception as error:
            self.error = error
            raise


def _explain(error: RuntimeError, vocab_size: int, num_lines: int) -> Exception:
    if num_lines == 0:
        return UserError("the input holds no text to train a tokenizer on")
    if match := _TOO_SMALL_TEXT.search(str(error)):
        return UserError(
            f"the input is too small for a vocabulary of {vocab_size}: "
            f"choose --vocab-size {match[1]} or less, or give more text"
        )
    if match := _TOO_SMALL_VOCABULARY.search(str(error)):
        return UserError(
            f"a vocabulary of {vocab_size} cannot hold the 259 special and byte ids and every frequent character: "
            f"choose --vocab-size {match[1]} or more, or a lower --character-coverage"
        )
    return error


def vocabulary_lines(model: bytes) -> Iterator[str]:
    """The `.vocab` file of a model, as SentencePiece's own trainer writes it: piece, tab, score."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for piece_id in range(processor.get_piece_size()):
        yield f"{processor.id_to_piece(piece_id)}\t{processor.get_score(piece_id):g}\n"
