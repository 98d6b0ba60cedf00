"""Forward passes over a whole dataset, each sample once, in any layout."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm


def forward_all(
    args: argparse.Namespace,
    model: torch.nn.Module,
    dataset: Dataset | Sequence | None,
    num_samples: int,
    forward_step: Callable,
    description: str,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Run the model over all samples, with a progress bar; to be iterated by all ranks alike.

    Args:
        args: Megatron's arguments; each rank takes `micro_batch_size` samples a step.
        model: the rank's part of the model.
        dataset: samples as `GPTDataset` gives them; None on ranks that do not read data.
        num_samples: of the dataset, on all ranks.
        forward_step: as Megatron's schedules take it.
        description: of the progress bar.

    Yields:
        the number of the step's first sample on this rank, and what the loss function returned for the step; nothing on
        ranks that are not on the last pipeline stage.
    """
    samples_a_step = args.micro_batch_size * mpu.get_data_parallel_world_size()
    num_steps = -(-num_samples // samples_a_step)
    data_iterator = _micro_batches(dataset, num_steps, args.micro_batch_size)
    is_reporting = torch.distributed.get_rank() == 0
    for step in tqdm(range(num_steps), desc=description, unit="batch", disable=None if is_reporting else True):
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
        )
        yield step * samples_a_step + mpu.get_data_parallel_rank() * args.micro_batch_size, outputs


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of what each data-parallel rank got on its last pipeline stage; on all ranks, in place."""
    # The ranks of a tensor parallel group got the same.
    if mpu.get_tensor_model_parallel_rank() != 0:
        values.zero_()
    torch.distributed.all_reduce(values)
    return values


def _micro_batches(dataset: Dataset | None, num_steps: int, micro_batch_size: int) -> Iterator[dict[str, Any]]:
    """Micro-batches of this data-parallel rank that cover a dataset exactly once.

    The last step's ranks may have less than a micro-batch, or nothing, left. They all take part nevertheless, since
    experts are shared, with samples whose loss does not count.
    """
    rank, ranks = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
    for step in range(num_steps):
        first = (step * ranks + rank) * micro_batch_size
        samples = []
        for index in range(first, first + micro_batch_size):
            sample = dataset[min(index, len(dataset) - 1)]
            if index >= len(dataset):
                sample = sample | {"loss_mask": torch.zeros_like(sample["loss_mask"])}
            samples.append(sample)
        yield default_collate(samples)
