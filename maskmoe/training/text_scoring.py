"""Log-likelihoods of texts, defined as in lm-evaluation-harness for the request types of its `hf` model."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.training.batch import get_batch, token_losses
from maskmoe.training.forward import forward_all, sum_over_ranks

_KEYS = ({"text"}, {"context", "continuation"})


@dataclass(frozen=True)
class Text:
    """A text to score.

    Attributes:
        context: Text before the continuation, which is not scored; None for the end of another document.
        continuation: Text that is scored.
    """

    context: str | None
    continuation: str


@dataclass(frozen=True)
class TextScore:
    """The probability of one text."""

    log_likelihood: float
    """Natural logarithm of the probability, the sum over the scored tokens."""
    tokens: int
    """Number of scored tokens."""
    bytes: int
    """Number of bytes of the scored text in UTF-8."""


@dataclass(frozen=True)
class TextScores:
    """The probabilities of some texts, with their sums."""

    texts: list[TextScore]
    log_likelihood: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, scores: list[TextScore]) -> "TextScores":
        """Return the scores with their sums."""
        return cls(
            scores,
            log_likelihood=sum(score.log_likelihood for score in scores),
            tokens=sum(score.tokens for score in scores),
            bytes=sum(score.bytes for score in scores),
        )

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
        UserError: The file cannot be read, a line is not such an object, or the file has no texts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    texts = [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not texts:
        raise UserError(f"{path} has no texts")
    return texts


def _read_line(line: str, where: str) -> Text:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    if not isinstance(values, dict) or not any(keys <= values.keys() for keys in _KEYS):
        raise UserError(f'{where}: must be {{"text": …}} or {{"context": …, "continuation": …}}')
    text = Text(None, values["text"]) if "text" in values else Text(values["context"], values["continuation"])
    if not isinstance(text.continuation, str) or not isinstance(text.context, str | None):
        raise UserError(f"{where}: a text must be a string")
    return text


@dataclass(frozen=True)
class Window:
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


def token_windows(texts: Sequence[Text], tokenizer: Any, length: int) -> list[Window]:
    """Return the windows of all texts.

    Args:
        texts: Texts to score.
        tokenizer: Megatron's tokenizer.
        length: Number of input tokens that the model takes.

    Raises:
        UserError: A text has no context, and the tokenizer has no id that ends a document.
    """
    found: list[Window] = []
    for number, text in enumerate(texts):
        if text.context:
            # White space belongs to the following word, so tokenize it together with the continuation.
            context = text.context.rstrip()
            spaces = text.context[len(context) :]
            tokens = tokenizer.tokenize(context + spaces + text.continuation)
            num_context = len(tokenizer.tokenize(context))
        else:
            if (end_of_document := getattr(tokenizer, "eod", None)) is None:
                raise UserError(
                    "the tokenizer has no end-of-document id, which must precede a text without context; "
                    'give the text a "context"'
                )
            tokens, num_context = [end_of_document], 1
            if text.continuation:
                tokens += tokenizer.tokenize(text.continuation)
        found += windows(number, tokens, num_context, length)
    return found


class _Samples:
    """Windows in the form of the samples of `GPTDataset`, padded to `length` tokens; made when they are needed."""

    def __init__(self, found: Sequence[Window], length: int) -> None:
        self._windows = found
        self._length = length

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self._windows[index]
        num_inputs = len(window.tokens) - 1
        padded = torch.zeros(self._length + 1, dtype=torch.long)
        padded[: num_inputs + 1] = torch.tensor(window.tokens)
        loss_mask = torch.zeros(self._length)
        loss_mask[num_inputs - window.num_scored : num_inputs] = 1
        return {
            "tokens": padded[:-1],
            "labels": padded[1:],
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self._length),
        }


@torch.no_grad()
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
    model.eval()
    args.create_attention_mask_in_dataloader = False
    tokenizer = get_tokenizer()
    _exclude_padding_ids(model, tokenizer.vocab_size)
    found = token_windows(texts, tokenizer, args.seq_length)
    likelihoods = torch.zeros(len(found) + args.micro_batch_size, dtype=torch.float64, device="cuda")

    def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple:
        batch = get_batch(data_iterator)
        return token_losses(model, batch), partial(_sum_of_samples, batch.loss_mask)

    # Compute the log-likelihood of every window.
    samples = _Samples(found, args.seq_length)
    for first, outputs in forward_all(args, model, samples, len(samples), forward_step, "scoring"):
        for output in outputs:
            # Samples beyond the last window fill up the last step. Their losses are 0.
            step_likelihoods = likelihoods[min(first, len(found)) :][: args.micro_batch_size]
            step_likelihoods -= output["losses"]
    sum_over_ranks(likelihoods)

    # Add up the windows of each text.
    text_likelihoods = torch.zeros(len(texts), dtype=torch.float64)
    text_likelihoods.index_add_(
        0, torch.tensor([window.text for window in found], dtype=torch.long), likelihoods[: len(found)].cpu()
    )
    num_tokens = [0] * len(texts)
    for window in found:
        num_tokens[window.text] += window.num_scored
    num_bytes = [len(text.continuation.encode()) for text in texts]
    return TextScores.of(
        [TextScore(*score) for score in zip(text_likelihoods.tolist(), num_tokens, num_bytes, strict=True)]
    )


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


def _sum_of_samples(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the loss of every sample.

    Args:
        loss_mask: float [batch, sequence].
        output_tensor: Loss of every token, [batch, sequence].

    Returns:
        The loss and the number of tokens in the form that Megatron's schedules take, and `losses`, float64 [batch].
    """
    losses = (output_tensor.double() * loss_mask).sum(dim=1)
    return losses.sum().float(), loss_mask.sum().to(torch.int), {"losses": losses}
