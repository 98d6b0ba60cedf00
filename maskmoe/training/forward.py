"""Forward passes over a whole dataset, each sample once, in any layout."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch.utils.data import default_collate
from tqdm import tqdm


class Samples(Protocol):
    """Samples in the form of Megatron's `GPTDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def forward_all(
    args: argparse.Namespace,
    model: torch.nn.Module,
    dataset: Samples | None,
    num_samples: int,
    forward_step: Callable,
    description: str,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Run the model over all samples, with a progress bar; all ranks must iterate over the result.

    Args:
        args: Megatron's arguments; each rank takes `micro_batch_size` samples in each step.
        model: This rank's part of the model.
        dataset: The samples; None on ranks that do not read data.
        num_samples: Number of samples of the dataset, on all ranks.
        forward_step: Forward step in the form that Megatron's schedules take.
        description: Label of the progress bar.

    Yields:
        For each step, the index of this rank's first sample and the results of the loss function; the results are empty
        on ranks that are not on the last pipeline stage.
    """
    samples_a_step = args.micro_batch_size * mpu.get_data_parallel_world_size()
    num_steps = -(-num_samples // samples_a_step)
    # Megatron's schedules take None, too, on ranks that do not read data.
    data_iterator: Any = _micro_batches(dataset, num_steps, args.micro_batch_size) if dataset is not None else None
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
    """Add up, in place, the values of each data-parallel rank's last pipeline stage; a collective call of all ranks.

    Args:
        values: Zeros on ranks that are not on the last pipeline stage.
    """
    # All ranks of a tensor-parallel group hold equal values, so count one of them.
    if mpu.get_tensor_model_parallel_rank() != 0:
        values.zero_()
    torch.distributed.all_reduce(values)
    return values


def _micro_batches(dataset: Samples, num_steps: int, micro_batch_size: int) -> Iterator[dict[str, Any]]:
    """Yield micro-batches of this data-parallel rank; together, all ranks cover the dataset exactly once.

    In the last step, a rank may have less than a micro-batch of samples left, or none. All ranks take part in the step
    nevertheless, since they share the experts. They fill up with copies of the last sample whose loss does not count.
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
