"""Evaluate a checkpoint: `torchrun … -m maskmoe.training.evaluate --load DIR --use-checkpoint-args --data-path P`.

Prints the loss and perplexity of the validation split, overall and by the frequency of the input token, and the load of
the experts in every layer. `--eval-iters N` evaluates the first N batches only, of `--eval-global-batch-size` samples.
"""

import argparse
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.datasets.utils import Split
from pydantic_core import to_jsonable_python

from maskmoe.data.indexed_dataset import dataset_files
from maskmoe.errors import UserError
from maskmoe.files.output_checks import check_outputs
from maskmoe.files.outputs import write_text
from maskmoe.megatron_compat.globals import get_tokenizer
from maskmoe.processes.console import console
from maskmoe.routing_mask.frequency import FrequencyBands, TokenFrequency, count_token_frequency
from maskmoe.training.evaluation.arguments import add_evaluation_arguments
from maskmoe.training.evaluation.loading import load_model
from maskmoe.training.evaluation.token_losses import build_whole_split, losses_of_all, sum_over_ranks
from maskmoe.training.model.model_builder import StageBuilder
from maskmoe.training.ranks import temporary_process_groups
from maskmoe.training.run_checks import parse_and_check_args
from maskmoe.training.settings.inputs import check_same_tokenizer, data_prefixes
from maskmoe.training.watch.routing_log import RoutingRecord, take_record
from maskmoe.transformer.router import MaskMoERouter


@dataclass(frozen=True)
class BandResult:
    """The loss of the tokens whose input id is in one frequency band."""

    name: str
    share: float
    """Share of the band in all tokens, from 0 to 1."""
    loss: float
    """Mean loss in nats per token; NaN for a band without tokens."""
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
        bands = (*self.bands, BandResult("all", 1.0, self.loss, self.perplexity, self.tokens))
        loads = ", ".join(f"{load.layer}: {load.max_over_mean:.2f}" for load in self.expert_load)
        rows = [
            f"{'input tokens':<14}{'share':>8}{'tokens':>12}{'loss':>9}{'perplexity':>13}",
            *(f"{b.name:<14}{b.share:>8.1%}{b.tokens:>12,}{b.loss:>9.4f}{b.perplexity:>13.2f}" for b in bands),
            f"\nexpert load, max/mean by layer: {loads}" if loads else "",
            f"{self.tokens:,} tokens in {self.seconds:.1f} s, {self.tokens_per_second:,.0f} tokens/s",
        ]
        return "\n".join(rows)


def read_token_frequency(args: argparse.Namespace) -> TokenFrequency | None:
    """Return the token counts of `--token-frequency`, or None if the flag is not given and the data must be counted.

    Raises:
        UserError: The counts cannot be read or are for another tokenizer, or there are neither counts nor data.
    """
    if args.token_frequency is None:
        if args.data_path is None:
            raise UserError("pass --token-frequency FILE, which defines the frequency bands")
        return None
    frequency, vocab_size = TokenFrequency.load(args.token_frequency), get_tokenizer().vocab_size
    if frequency.vocab_size != vocab_size:
        raise UserError(
            f"--token-frequency {args.token_frequency} counts {frequency.vocab_size} ids, the model has {vocab_size}"
        )
    if frequency.tokenizer is not None:
        check_same_tokenizer(args, frequency.tokenizer, f"--token-frequency {args.token_frequency} was")
    return frequency


def evaluate(args: argparse.Namespace, model: torch.nn.Module, frequency: TokenFrequency | None) -> Evaluation:
    """Run the model over the split; a collective call, which returns equal results on all ranks.

    Args:
        args: Megatron's arguments; `eval_iters` is the number of global batches, 0 for the whole split.
        model: This rank's part of the model.
        frequency: Token counts that define the frequency bands; without them, the data are counted.

    Raises:
        UserError: The split is empty.
    """
    if frequency is None:
        frequency = count_token_frequency(args.data_path, get_tokenizer().vocab_size, workers=1, progress=False)
    bands = FrequencyBands(frequency.occurrences)
    band_of_id = torch.from_numpy(bands.band_of_id).cuda()
    dataset: Any = build_whole_split(Split[args.eval_split])
    num_samples = [len(dataset) if dataset is not None else 0]
    torch.distributed.broadcast_object_list(num_samples, src=0)
    if num_samples == [0]:
        raise UserError(
            f"no dataset has a sample in the {args.eval_split} split; give it a larger share in --split, or choose "
            "another --eval-split"
        )
    limit = args.eval_iters * args.eval_global_batch_size
    if 0 < limit < num_samples[0]:
        console.say(f"note: --eval-iters {args.eval_iters}: {limit:,} of {num_samples[0]:,} samples are evaluated")
        num_samples = [limit]

    # Add up the losses and the tokens of each band, and the tokens of each expert.
    for module in model.modules():
        if isinstance(module, MaskMoERouter):
            module.counts_in_evaluation = True
    sums = torch.zeros(len(bands.names), 2, dtype=torch.float64, device=torch.cuda.current_device())
    sample = None if dataset is None else dataset.__getitem__
    start = time.perf_counter()
    for batch, losses in losses_of_all(args, model, sample, num_samples[0]):
        mask = batch.loss_mask.double()
        values = torch.stack([losses.double() * mask, mask], dim=-1)  # [batch, sequence, 2]
        sums.index_add_(0, band_of_id[batch.tokens].flatten(), values.flatten(0, 1))
    sum_over_ranks(sums)
    seconds = time.perf_counter() - start

    # Summarise each band, and all tokens.
    sums = torch.cat([sums, sums.sum(dim=0, keepdim=True)])
    total_losses, tokens = sums.T
    mean_losses = total_losses / tokens
    columns = (tokens / tokens[-1], mean_losses, mean_losses.exp(), tokens.long())
    rows = zip((*bands.names, "all"), *(column.tolist() for column in columns), strict=True)
    *band_results, overall = (BandResult(*row) for row in rows)
    # Without sequence parallelism, the ranks of a tensor-parallel group route the same tokens.
    num_copies = 1 if args.sequence_parallel else args.tensor_model_parallel_size
    record = take_record([model]) if args.num_experts else RoutingRecord({}, {})
    expert_load = [
        ExpertLoad(
            layer + 1,
            record.by_layer["expert_load_max_over_mean"][layer],
            [round(tokens / num_copies) for tokens in load],
        )
        for layer, load in record.tokens_per_expert.items()
    ]
    of_all = (overall.loss, overall.perplexity, overall.tokens)
    return Evaluation(*of_all, band_results, expert_load, seconds, tokens_per_second=overall.tokens / seconds)


def check_output(args: argparse.Namespace) -> None:
    """Check that `--output` may be written, see `check_outputs`.

    Raises:
        UserError: The file is an input, exists without `--force`, or cannot be written.
    """
    if args.output is not None:
        inputs = (args.load, args.routing_mask, args.tokenizer_model, args.token_frequency)
        inputs += (args.vocab_file, args.merge_file, args.metadata_path)
        inputs += (args.data_args_path, args.per_split_data_args_path)
        data = (path for prefix in data_prefixes(args) for path in dataset_files(prefix))
        check_outputs([args.output], [*filter(None, inputs), *data], args.force)


def main(builder: type[StageBuilder] | None = None) -> None:
    """Evaluate as the command line says, with another builder of models if one is given."""
    args = parse_and_check_args(add_evaluation_arguments).args
    check_output(args)
    frequency = read_token_frequency(args)
    with temporary_process_groups():
        model = load_model(args, builder)
        results = evaluate(args, model, frequency)
        content = json.dumps(to_jsonable_python(results, inf_nan_mode="null"), indent=2, allow_nan=False)
        if torch.distributed.get_rank() == 0:
            if args.output is not None:
                write_text(args.output, content + "\n")
            # Last, since nobody may read it: `| head`.
            print(results.table(), file=console.result, flush=True)
