"""The loss of every token of a dataset, each sample once."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.utils import Split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from maskmoe.megatron_compat.globals import get_args
from maskmoe.processes.console import console, progress_bar
from maskmoe.training.model.batch import Batch, Blend, build_blend, get_batch, token_losses


def build_whole_split(split: Split) -> Dataset | None:
    """Build a dataset that holds every sample of a split once; built on the ranks on which `build_datasets` builds.

    Megatron cannot do so for datasets with weights, nor if one of the datasets has no sample. Here weights have no
    effect. The samples of several datasets alternate, in proportion to the sizes of the datasets.

    Returns:
        The dataset; None for a split without samples, and on ranks that do not read data.
    """
    console.load("building the datasets")
    one_epoch = [None] * len(Split)
    blend, blend_per_split = get_blend_and_blend_per_split(get_args())
    if blend is None and blend_per_split is None:  # mock data
        return build_blend(one_epoch, None, None)[split.value]
    of_split: Blend | None = blend if blend_per_split is None else blend_per_split[split.value]
    # Build each dataset by itself, and leave out datasets without a sample.
    datasets = []
    for prefix in of_split[0] if of_split else ():
        alone: Blend = ([prefix], None)
        per_split = blend_per_split and [alone if each is split else None for each in Split]
        dataset = build_blend(one_epoch, None if per_split else alone, per_split)[split.value]
        if dataset is not None and len(dataset):
            datasets.append(dataset)
        else:
            console.say(f"note: dataset {prefix} has no sample in the {split.name} split")
    if len(datasets) < 2:
        return next(iter(datasets), None)
    # Sort all samples by their relative place in their dataset.
    places = np.concatenate([(np.arange(len(dataset)) + 0.5) / len(dataset) for dataset in datasets])
    return Subset(ConcatDataset(datasets), places.argsort(kind="stable").tolist())


@torch.no_grad()
def losses_of_all(
    args: Namespace,
    model: torch.nn.Module,
    sample: Callable[[int], dict[str, Any]] | None,
    num_samples: int,
) -> Iterator[tuple[Batch, Tensor]]:
    """Compute the loss of every token of a dataset, with a progress bar; all ranks must iterate over the result.

    Args:
        args: Megatron's arguments; each rank takes `eval_micro_batch_size` samples in each step.
        model: This rank's part of the model.
        sample: Returns a sample by its index, in the form of Megatron's `GPTDataset`; None on ranks that do not read
            data.
        num_samples: Number of samples of the dataset, on all ranks.

    Yields:
        For each step, the micro-batch and the loss of every token [batch, sequence]; nothing on ranks that are not on
        the last pipeline stage.
    """
    model.eval()
    micro_batch_size = args.eval_micro_batch_size
    samples_a_step = micro_batch_size * mpu.get_data_parallel_world_size()
    first_of_rank = mpu.get_data_parallel_rank() * micro_batch_size
    steps = range(0, num_samples, samples_a_step)

    def micro_batches(sample: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield micro-batches of this data-parallel rank; together, all ranks cover the dataset exactly once.

        In the last step, a rank may have less than a micro-batch of samples left, or none. All ranks take part in the
        step nevertheless, since they share the experts. They fill up with copies of the last sample whose loss does
        not count.
        """
        for first in (step + first_of_rank for step in steps):
            samples = [sample(min(index, num_samples - 1)) for index in range(first, first + micro_batch_size)]
            for copy in samples[max(0, num_samples - first) :]:
                copy["loss_mask"] = torch.zeros_like(copy["loss_mask"])
            yield default_collate(samples)

    def forward_step(start: int, data_iterator: Iterator, model: torch.nn.Module) -> tuple:
        """Run one micro-batch of the step that begins at sample `start`.

        Returns:
            The losses, and a function that keeps them with the micro-batch.
        """
        batch = get_batch(data_iterator, micro_batch_size)
        # In a step that is filled up, samples beyond the last one are padding for the routers. All ranks pass a mask in
        # that step, since they dispatch together.
        is_padding = None
        if args.num_experts and start + samples_a_step > num_samples:
            indices = start + first_of_rank + torch.arange(len(batch.tokens), device=batch.tokens.device)
            is_padding = (indices >= num_samples).unsqueeze(1).expand_as(batch.tokens)
        return token_losses(model, batch, is_padding), lambda losses, non_loss_data: (batch, losses)

    # Megatron's schedules take None, too, on ranks that do not read data.
    data_iterator: Any = micro_batches(sample) if sample is not None else None
    for start in progress_bar(steps, "evaluating", "batch"):
        yield from get_forward_backward_func()(
            forward_step_func=partial(forward_step, start),
            data_iterator=data_iterator,
            model=model,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up, in place, the values of each rank; a collective call of all ranks.

    The ranks of a tensor-parallel group have equal values, so the values of the first rank count. Ranks that have
    nothing to add, such as ranks that are not on the last pipeline stage, pass zeros.
    """
    if mpu.get_tensor_model_parallel_rank() != 0:
        values.zero_()
    torch.distributed.all_reduce(values)
    return values
