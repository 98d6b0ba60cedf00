"""Log-likelihoods of texts, counted as lm-evaluation-harness counts them (its `hf` model's request types)."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.utils import unwrap_model
from megatron.training import get_tokenizer
from torch import Tensor

from maskmoe.errors import UserError
from maskmoe.training.batch import get_batch, token_losses
from maskmoe.training.forward import forward_all, sum_over_ranks

_KEYS = ({"text"}, {"context", "continuation"})


@dataclass(frozen=True)
class Text:
    """A text to score.

    Attributes:
        context: what comes before and is not scored; None: the end of another document.
        continuation: what is scored.
    """

    context: str | None
    continuation: str


@dataclass(frozen=True)
class TextScore:
    """How probable a text is."""

    log_likelihood: float
    """natural logarithm, the sum over its tokens"""
    tokens: int
    bytes: int
    """of UTF-8"""


@dataclass(frozen=True)
class TextScores:
    """How probable some texts are."""

    texts: list[TextScore]
    log_likelihood: float
    tokens: int
    bytes: int

    @classmethod
    def of(cls, scores: list[TextScore]) -> "TextScores":
        """With their sums."""
        sums = (sum(getattr(score, name) for score in scores) for name in ("log_likelihood", "tokens", "bytes"))
        return cls(scores, *sums)

    def table(self) -> str:
        """The results as text."""
        return (
            f"{len(self.texts):,} texts, {self.tokens:,} tokens, {self.bytes:,} bytes\n"
            f"log-likelihood {self.log_likelihood:.4f}\n"
            f"perplexity {exp(-self.log_likelihood / max(1, self.tokens)):.2f} a token, "
            f"{-self.log_likelihood / log(2) / max(1, self.bytes):.4f} bits a byte"
        )


def read_texts(path: str | Path) -> list[Text]:
    """Read JSON lines, each `{"text": …}`, or `{"context": …, "continuation": …}` to score only the second.

    Raises:
        UserError: the file cannot be read, a line is no such object, or there is none.
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
    """Tokens of a text that fit into the model at once, some of which are scored.

    Attributes:
        text: number of the text.
        tokens: the input ids and, after the last, one more.
        num_scored: how many of the last tokens are scored.
    """

    text: int
    tokens: tuple[int, ...]
    num_scored: int


def windows(text: int, tokens: Sequence[int], num_context: int, length: int) -> Iterator[Window]:
    """Divide a text so that each token after the context is scored once, with as much before it as fits.

    Args:
        text: number of the text.
        tokens: of context and continuation.
        num_context: tokens that are not scored, at least one.
        length: input tokens that the model takes.
    """
    for begin in range(num_context, len(tokens), length):
        end = min(begin + length, len(tokens))
        yield Window(text, tuple(tokens[max(0, end - length - 1) : end]), end - begin)


def token_windows(texts: Sequence[Text], tokenizer: Any, length: int) -> list[Window]:
    """The windows of all texts.

    Raises:
        UserError: a text without context, and the tokenizer has no id that ends a document.
    """
    found: list[Window] = []
    for number, text in enumerate(texts):
        if text.context:
            # White space belongs to the word that follows it.
            context = text.context.rstrip()
            spaces = text.context[len(context) :]
            tokens = tokenizer.tokenize(context + spaces + text.continuation)
            num_context = len(tokenizer.tokenize(context))
        else:
            if (end_of_document := getattr(tokenizer, "eod", None)) is None:
                raise UserError("the tokenizer has no id that ends a document, after which a text would begin")
            tokens, num_context = [end_of_document], 1
            if text.continuation:
                tokens += tokenizer.tokenize(text.continuation)
        found += windows(number, tokens, num_context, length)
    return found


class _Samples(Sequence):
    """Windows as the samples that `GPTDataset` gives."""

    def __init__(self, found: Sequence[Window], length: int):
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
    """Score texts; a collective call of all ranks, with the same result on all.

    Args:
        args: Megatron's arguments; `seq_length` is how much of a text the model sees at once.
        model: the rank's part of the model.
        texts: what to score.

    Ids by which the vocabulary is padded for tensor parallelism get no share of the probability. (In training, and in
    the loss of a dataset, Megatron has them in.)

    Raises:
        UserError: see `token_windows`.
    """
    model.eval()
    args.create_attention_mask_in_dataloader = False
    tokenizer = get_tokenizer()
    _leave_padding_ids_out(model, tokenizer.vocab_size)
    found = token_windows(texts, tokenizer, args.seq_length)
    likelihoods = torch.zeros(len(found) + args.micro_batch_size, dtype=torch.float64, device="cuda")

    def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple:
        batch = get_batch(data_iterator)
        return token_losses(model, batch), partial(_sum_of_samples, batch.loss_mask)

    samples = _Samples(found, args.seq_length)
    for first, outputs in forward_all(args, model, samples, len(samples), forward_step, "scoring"):
        for output in outputs:
            # Beyond the last window there are samples that do not count.
            of_step = likelihoods[min(first, len(found)) :][: args.micro_batch_size]
            of_step -= output["losses"]
    sum_over_ranks(likelihoods)
    of_text = torch.zeros(len(texts), dtype=torch.float64)
    of_text.index_add_(
        0, torch.tensor([window.text for window in found], dtype=torch.long), likelihoods[: len(found)].cpu()
    )
    num_tokens = [0] * len(texts)
    for window in found:
        num_tokens[window.text] += window.num_scored
    num_bytes = [len(text.continuation.encode()) for text in texts]
    return TextScores.of([TextScore(*score) for score in zip(of_text.tolist(), num_tokens, num_bytes, strict=True)])


def _leave_padding_ids_out(model: torch.nn.Module, vocab_size: int) -> None:
    """Give the ids by which Megatron pads the vocabulary no share of the probability, as they have none elsewhere."""
    model = unwrap_model(model)
    if not model.post_process:
        return

    def mask_logits(layer: torch.nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor | None]) -> tuple:
        logits, bias = outputs  # [sequence, batch, vocabulary of this rank]
        first = mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
        is_padding = torch.arange(first, first + logits.shape[-1], device=logits.device) >= vocab_size
        return logits.masked_fill(is_padding, float("-inf")), bias

    model.output_layer.register_forward_hook(mask_logits)


def _sum_of_samples(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss of every sample.

    Args:
        loss_mask: float [batch, sequence].
        output_tensor: loss of every token, [batch, sequence].

    Returns:
        the loss and the number of tokens as Megatron's schedules want them, and `losses`, float64 [batch].
    """
    losses = (output_tensor.double() * loss_mask).sum(dim=1)
    return losses.sum().float(), loss_mask.sum().to(torch.int), {"losses": losses}
