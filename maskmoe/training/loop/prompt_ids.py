"""Token ids of a prompt, checked against the vocabulary before a model is loaded."""

from maskmoe.errors import UserError
from maskmoe.files.foreign_libraries import reading
from maskmoe.megatron_compat.globals import get_tokenizer


def tokenize_text(text: str, what: str = "--prompt") -> list[int]:
    """Return the token ids of a text, by the tokenizer of the run.

    A NullTokenizer reads ids from the text, so they may be words, or ids that the model lacks.

    Args:
        text: the text.
        what: the source of the text, for the error.

    Raises:
        UserError: the tokenizer cannot read the text, or an id is beyond the vocabulary.
    """
    tokenizer = get_tokenizer()
    with reading(f"{what} does not suit the tokenizer: it", "a NullTokenizer takes token ids separated by spaces"):
        ids = list(tokenizer.tokenize(text))
    if beyond := [token for token in ids if not 0 <= token < tokenizer.vocab_size]:
        last = tokenizer.vocab_size - 1
        raise UserError(f"{what} has the token id {beyond[0]}, but the vocabulary has ids 0 to {last}")
    return ids
