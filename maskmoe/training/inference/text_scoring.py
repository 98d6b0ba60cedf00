"""Log-likelihoods of texts, defined as in lm-evaluation-harness for the request types of its `hf` model."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.files.json_lines import Line, read_lines
from maskmoe.files.surrogates import refuse_surrogates
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.training.inference.token_losses import losses_of_all, sum_over_ranks


class Text(NamedTuple):
    """A text to score.

    Attributes:
        context: Text before the continuation, which is not scored; None or white space for the end of a document.
        continuation: Text that is scored.
    """

    context: str | None
    continuation: str


@dataclass(frozen=True)
class TextScore:
    """The probability of a text."""

    log_likelihood: float
    """Natural logarithm of the probability, the sum over the scored tokens."""
    tokens: int
    """Number of scored tokens."""
    bytes: int
    """Number of bytes of the scored text in UTF-8."""


@dataclass(frozen=True)
class TextScores(TextScore):
    """The probability of some texts together, and of each of them."""

    texts: list[TextScore]

    def table(self) -> str:
        """Return the results as text for the terminal."""
        return (
            f"{len(self.texts):,} texts, {self.tokens:,} tokens, {self.bytes:,} bytes\n"
            f"log-likelihood {self.log_likelihood:.4f}\n"
            f"perplexity {exp(-self.log_likelihood / max(1, self.tokens)):.2f} a token, "
            f"{-self.log_likelihood / log(2) / max(1, self.bytes):.4f} bits a byte"
        )


def read_texts(path: str | Path) -> list[Text]:
    """Read JSON lines, each `{"text": …}`, or `{"context": …, "continuation": …}` to score only the second.

    Raises:
        UserError: The file cannot be read, a line is not such an object or not valid Unicode, or the file has no texts.
    """
    return [_text_of(line) for line in read_lines(Path(path), "--eval-texts")]


def _text_of(line: Line) -> Text:
    values = line.parse()
    if not ("text" in values or {"context", "continuation"} <= values.keys()):
        raise UserError(f'{line.place} must be {{"text": …}} or {{"context": …, "continuation": …}}')
    text = Text(None, values["text"]) if "text" in values else Text(values["context"], values["continuation"])
    if not isinstance(text.continuation, str) or not isinstance(text.context, str | None):
        raise UserError(f"{line.place} has a text that is not a string")
    refuse_surrogates((text.context or "") + text.continuation, line.place)
    return text


class Window(NamedTuple):
    """Tokens of a text that the model sees at once, the last of which are scored.

    Attributes:
        text: Number of the text.
        tokens: The input ids, followed by the label of the last input.
        num_scored: Number of the last tokens that are scored.
    """

    text: int
    tokens: tuple[int, ...]
    num_scored: int


def windows(text: int, tokens: Sequence[int], num_context: int, length: int) -> Iterator[Window]:
    """Divide a text so that each token after the context is scored once, after as many preceding tokens as fit.

    Args:
        text: Number of the text.
        tokens: Token ids of the context and the continuation.
        num_context: Number of context tokens, which are not scored; at least one.
        length: Number of input tokens that the model takes.
    """
    for begin in range(num_context, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield Window(text, tuple(tokens[max(0, end - length - 1) : end]), end - begin)


def token_windows(texts: Sequence[Text], tokenizer: Any, length: int) -> Iterator[Window]:
    """Yield the windows of all texts.

    Args:
        texts: Texts to score.
        tokenizer: Megatron's tokenizer.
        length: Number of input tokens that the model takes.

    Raises:
        UserError: A text has no context, and the tokenizer has no id that ends a document.
    """
    for number, text in enumerate(texts):
        # White space belongs to the following word, so it is scored together with the continuation.
        context, whole = (text.context or "").rstrip(), (text.context or "") + text.continuation
        num_context = len(tokenizer.tokenize(context)) if context else 0
        tokens = tokenizer.tokenize(whole) if whole else []
        if not num_context:
            if (end_of_document := getattr(tokenizer, "eod", None)) is None:
                raise UserError(
                    "the tokenizer has no end-of-document id, which must precede a text without context; "
                    'give the text a "context"'
                )
            tokens, num_context = [end_of_document, *tokens], 1
        yield from windows(number, tokens, num_context, length)


def _sample_of(window: Window, length: int) -> dict[str, Tensor]:
    """Return a window in the form of a sample of `GPTDataset`, padded to `length` tokens."""
    num_inputs = len(window.tokens) - 1
    padded = torch.zeros(length + 1, dtype=torch.long)
    padded[: num_inputs + 1] = torch.tensor(window.tokens)
    loss_mask = torch.zeros(length)
    loss_mask[num_inputs - window.num_scored : num_inputs] = 1
    position_ids = torch.arange(length)
    return {"tokens": padded[:-1], "labels": padded[1:], "loss_mask": loss_mask, "position_ids": position_ids}


def score_texts(args: argparse.Namespace, model: torch.nn.Module, texts: Sequence[Text]) -> TextScores:
    """Score texts; a collective call, which returns equal results on all ranks.

    Megatron pads the vocabulary for tensor parallelism. Here the padding ids get no share of the probability, as in
    other implementations. In training, and in the loss of a dataset, Megatron gives them a share.

    Args:
        args: Megatron's arguments; `seq_length` is the number of tokens that the model sees at once.
        model: This rank's part of the model.
        texts: Texts to score.

    Raises:
        UserError: A text has no context, and the tokenizer has no id that ends a document.
    """
    # Samples are single texts.
    args.create_attention_mask_in_dataloader = args.dataloader_inter_document_masking = False
    tokenizer = get_tokenizer()
    _exclude_padding_ids(model, tokenizer.vocab_size)
    found = list(token_windows(texts, tokenizer, args.seq_length))
    likelihoods = torch.zeros(len(found), dtype=torch.float64, device="cuda")

    # Compute the log-likelihood of every window.
    def sample(index: int) -> dict[str, Tensor]:
        return _sample_of(found[index], args.seq_length)

    for first, batch, losses in losses_of_all(args, model, sample, len(found), "scoring"):
        step_likelihoods = likelihoods[first : first + args.micro_batch_size]
        # The last step may be filled up with samples beyond the last window.
        step_likelihoods -= (losses.double() * batch.loss_mask).sum(dim=1)[: len(step_likelihoods)]

    # Add up the windows of each text.
    log_likelihoods, num_tokens = [0.0] * len(texts), [0] * len(texts)
    for window, likelihood in zip(found, sum_over_ranks(likelihoods).tolist(), strict=True):
        log_likelihoods[window.text] += likelihood
        num_tokens[window.text] += window.num_scored
    num_bytes = [len(text.continuation.encode()) for text in texts]
    scores = [TextScore(*score) for score in zip(log_likelihoods, num_tokens, num_bytes, strict=True)]
    return TextScores(sum(log_likelihoods), sum(num_tokens), sum(num_bytes), scores)


def _exclude_padding_ids(model: torch.nn.Module, vocab_size: int) -> None:
    """Set the logits of the ids that pad the vocabulary to minus infinity, by a hook on the output layer.

    Args:
        model: This rank's part of the model; only a last pipeline stage has an output layer.
        vocab_size: Number of ids of the tokenizer; all larger ids are padding.
    """
    stage: Any = unwrap_model(cast(Any, model))
    if not stage.post_process:
        return

    def mask_logits(layer: torch.nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple:
        logits, bias = outputs  # [sequence, batch, vocabulary of this rank]
        first = mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        is_padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocab_size
        return logits.masked_fill(is_padding, float("-inf")), bias

    stage.output_layer.register_forward_hook(mask_logits)
