"""Evaluate a checkpoint: `torchrun … -m maskmoe.training.evaluate --load DIR --use-checkpoint-args --data-path P`.

Prints the loss and perplexity of the validation split, overall and by the frequency of the input token, and the load of
the experts in every layer. With `--eval-texts F.jsonl`, the command scores the texts of that file instead.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.training import print_rank_0
from torch import Tensor

from maskmoe.cli import atomic_output
from maskmoe.errors import UserError
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency, count_token_frequency
from maskmoe.training.batch import Batch, build_datasets, get_batch, token_losses
from maskmoe.training.forward import forward_all, sum_over_ranks
from maskmoe.training.setup import leaving_process_groups, load_model, parse_and_check_args
from maskmoe.training.text_scoring import TextScores, read_texts, score_texts
from maskmoe.transformer.router import MaskMoERouter
from maskmoe.transformer.token_ids import TokenIds

_SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class BandResult:
    """The loss of the tokens whose input id is in one frequency band."""

    name: str
    share: float
    """Share of the band in all tokens, from 0 to 1."""
    loss: float
    """Mean loss in nats per token."""
    perplexity: float
    tokens: int


@dataclass(frozen=True)
class ExpertLoad:
    """The distribution of the tokens of one layer over its experts."""

    layer: int
    """Number of the layer in the whole model, from 1. Layers of multi-token prediction follow the decoder's layers."""
    max_over_mean: float
    """Tokens of the expert with the most tokens, divided by the mean over all experts."""
    tokens_per_expert: list[int]


@dataclass(frozen=True)
class Evaluation:
    """All results of one evaluation."""

    loss: float
    """Mean loss in nats per token."""
    perplexity: float
    tokens: int
    bands: list[BandResult]
    expert_load: list[ExpertLoad]
    seconds: float
    tokens_per_second: float

    def table(self) -> str:
        """Return the results as text for the terminal."""
        lines = [f"{'input tokens':<14}{'share':>8}{'tokens':>12}{'loss':>9}{'perplexity':>13}"]
        overall = BandResult("all", 1.0, self.loss, self.perplexity, self.tokens)
        for band in (*self.bands, overall):
            lines.append(
                f"{band.name:<14}{band.share:>8.1%}{band.tokens:>12,}{band.loss:>9.4f}{band.perplexity:>13.2f}"
            )
        lines.append("")
        if self.expert_load:
            loads = ", ".join(f"{load.layer}: {load.max_over_mean:.2f}" for load in self.expert_load)
            lines.append(f"expert load, max/mean by layer: {loads}")
        lines.append(f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s")
        return "\n".join(lines)


class ExpertLoadCounter:
    """Counts the tokens that each router sends to each expert, by forward hooks; padding is not counted.

    Each rank counts the tokens that it routes. The result is the sum over ranks.

    Args:
        model: This rank's part of the model.
        num_layers: Number of layers of the whole model, layers of multi-token prediction included.
        num_experts: Number of experts of a layer; 0 for a model without experts.
    """

    def __init__(self, model: torch.nn.Module, num_layers: int, num_experts: int) -> None:
        self.counts = torch.zeros(num_layers, num_experts, dtype=torch.long, device=torch.cuda.current_device())
        for module in model.modules():
            if isinstance(module, MaskMoERouter):
                module.register_forward_hook(self._count)

    def _count(self, router: MaskMoERouter, inputs: tuple[Tensor, TokenIds], outputs: tuple[Tensor, Tensor]) -> None:
        is_padding = inputs[1].is_padding  # [sequence, batch]
        _, routing_map = outputs  # [tokens, experts]
        if is_padding is not None:
            routing_map = routing_map & ~is_padding.reshape(-1, 1)
        # Not `layer_number`: layers of multi-token prediction count theirs from 1 again.
        self.counts[router.number_in_model - 1] += routing_map.sum(dim=0)

    def result(self) -> list[ExpertLoad]:
        """Return the load, summed over all ranks, of each layer that has experts; a collective call."""
        # Without sequence parallelism, all ranks of a tensor-parallel group route the same tokens.
        counts = self.counts.clone() if mpu.get_tensor_model_parallel_rank() == 0 else torch.zeros_like(self.counts)
        torch.distributed.all_reduce(counts)
        return [
            ExpertLoad(layer, float(load.max() / load.double().mean()), load.tolist())
            for layer, load in enumerate(counts.cpu(), start=1)
            if load.any()
        ]


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `evaluation` group, and defaults for the settings of training that Megatron requires."""
    group = parser.add_argument_group(title="evaluation")
    group.add_argument("--eval-split", choices=_SPLITS, default="valid", help="which split of --data-path to evaluate")
    group.add_argument(
        "--token-frequency",
        metavar="FILE",
        help="token counts made by tools/count_token_frequency.py, which define the frequency bands; "
        "if the flag is left out, the tokens of --data-path are counted",
    )
    group.add_argument(
        "--eval-texts",
        metavar="FILE",
        help="score texts instead of a dataset: JSON lines with a text, or with a context and a continuation, of which "
        "the continuation is scored; the log-likelihoods equal the ones that lm-evaluation-harness computes",
    )
    group.add_argument("--eval-output", metavar="FILE", help="also write the results as JSON")
    parser.set_defaults(micro_batch_size=4, skip_train=True, no_load_optim=True, no_load_rng=True, num_workers=0)
    return parser


def read_token_frequency(args: argparse.Namespace, vocab_size: int) -> TokenFrequency:
    """Return the token counts that define the frequency bands.

    Args:
        args: Megatron's arguments.
        vocab_size: Number of ids of the tokenizer.

    Raises:
        UserError: The counts are for another vocabulary, or there are neither counts nor a data path to count.
    """
    if args.token_frequency is None:
        if args.data_path is None:
            raise UserError("pass --token-frequency FILE, which defines the frequency bands")
        return count_token_frequency(args.data_path, vocab_size, workers=1, progress=False)
    frequency = TokenFrequency.load(args.token_frequency)
    if frequency.vocab_size != vocab_size:
        raise UserError(
            f"--token-frequency {args.token_frequency} counts {frequency.vocab_size} ids, the model has {vocab_size}"
        )
    return frequency


def band_loss_function(
    tokens: Tensor, loss_mask: Tensor, band_of_id: Tensor, num_bands: int, output_tensor: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum of losses and the number of tokens in every frequency band.

    Args:
        tokens: Input ids, int64 [batch, sequence].
        loss_mask: float [batch, sequence].
        band_of_id: int64 [vocab].
        num_bands: Number of bands.
        output_tensor: Loss of every token, [batch, sequence].

    Returns:
        The loss and the number of tokens in the form that Megatron's schedules take, and `bands`, float64 [bands, 2].
    """
    mask = loss_mask.reshape(-1).double()
    losses = output_tensor.reshape(-1).double() * mask
    values = torch.stack([losses, mask], dim=1)  # [tokens, 2]
    bands = values.new_zeros(num_bands, 2).index_add_(0, band_of_id[tokens.reshape(-1)], values)
    return losses.sum().float(), mask.sum().to(torch.int), {"bands": bands}


@torch.no_grad()
def evaluate(args: argparse.Namespace, model: torch.nn.Module, bands: FrequencyBands) -> Evaluation:
    """Run the model over the whole split; a collective call, which returns equal results on all ranks.

    Args:
        args: Megatron's arguments.
        model: This rank's part of the model.
        bands: Frequency bands of the input ids.

    Raises:
        UserError: The split is empty.
    """
    model.eval()
    dataset = build_datasets(args, [None, None, None])[_SPLITS.index(args.eval_split)]
    num_samples = _broadcast_object(len(dataset) if dataset is not None else 0)
    if num_samples == 0:
        raise UserError(f"the {args.eval_split} split of {args.data_path} (--split {args.split}) has no sample")
    band_of_id = torch.from_numpy(bands.band_of_id).cuda()
    counter = ExpertLoadCounter(model, args.num_layers + (args.mtp_num_layers or 0), args.num_experts or 0)

    num_whole_steps = num_samples // (args.micro_batch_size * mpu.get_data_parallel_world_size())
    steps = itertools.count()

    def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple:
        batch = get_batch(data_iterator)
        # The last step may have fewer samples than all ranks take. The samples that fill it up are padding for the
        # routers. All ranks pass a mask in that step, since they dispatch together.
        is_filled_up = args.num_experts and next(steps) >= num_whole_steps
        output = token_losses(model, batch, _mask_uncounted_samples(batch) if is_filled_up else None)
        return output, partial(band_loss_function, batch.tokens, batch.loss_mask, band_of_id, len(bands.names))

    sums = torch.zeros(len(bands.names), 2, dtype=torch.float64, device=torch.cuda.current_device())
    start = time.perf_counter()
    for _, outputs in forward_all(args, model, dataset, num_samples, forward_step, "evaluating"):
        for output in outputs:
            sums += output["bands"]
    sum_over_ranks(sums)
    seconds = time.perf_counter() - start
    return _summarise(sums.cpu().numpy(), bands.names, counter.result(), seconds)


def _mask_uncounted_samples(batch: Batch) -> Tensor:
    """Return bool [batch, sequence], True in samples without a token that counts."""
    return ~batch.loss_mask.any(dim=1, keepdim=True).expand_as(batch.tokens)


def _broadcast_object(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _summarise(sums: np.ndarray, names: tuple[str, ...], expert_load: list[ExpertLoad], seconds: float) -> Evaluation:
    """Return the results of an evaluation.

    Args:
        sums: Sum of losses and number of tokens of every band, float64 [bands, 2].
        names: Names of the bands.
        expert_load: Load of every layer with experts.
        seconds: Duration.
    """
    losses, counts = sums.T
    total_loss, total = losses.sum() / counts.sum(), int(counts.sum())
    results = []
    for name, loss, count in zip(names, losses, counts, strict=True):
        mean = float(loss / count) if count else float("nan")
        results.append(BandResult(name, float(count / total), mean, float(np.exp(mean)), int(count)))
    return Evaluation(
        loss=float(total_loss),
        perplexity=float(np.exp(total_loss)),
        tokens=total,
        bands=results,
        expert_load=expert_load,
        seconds=seconds,
        tokens_per_second=total / seconds,
    )


def evaluate_split(args: argparse.Namespace, model: torch.nn.Module) -> Evaluation:
    """Run `evaluate` with the frequency bands that `--token-frequency` or the data define."""
    frequency = read_token_frequency(args, get_tokenizer().vocab_size)
    return evaluate(args, model, FrequencyBands.from_occurrences(frequency.occurrences))


def main() -> None:
    """Evaluate as the command line says."""
    args = parse_and_check_args(add_evaluation_arguments, reads_data=lambda args: args.eval_texts is None)
    texts = read_texts(args.eval_texts) if args.eval_texts is not None else None
    with leaving_process_groups():
        model = load_model(args)
        results: Evaluation | TextScores
        results = evaluate_split(args, model) if texts is None else score_texts(args, model, texts)
        print_rank_0(results.table())
        if args.eval_output is not None and torch.distributed.get_rank() == 0:
            with atomic_output(Path(args.eval_output)) as path:
                path.write_text(json.dumps(asdict(results), indent=2) + "\n")
