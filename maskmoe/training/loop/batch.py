"""Datasets, micro-batches with the token ids on every pipeline stage, and the losses of their tokens."""

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training.datasets.fim_dataset import GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from maskmoe.megatron_compat.globals import get_args, get_tokenizer
from maskmoe.training.loop.fill_in_middle import FillInMiddleDataset, token_settings
from maskmoe.training.settings.data_order import samples_to_request
from maskmoe.training.watch.console import console, progress_bar
from maskmoe.transformer.packed_documents import PackedDocuments


class Batch(NamedTuple):
    """One micro-batch on one rank; every tensor is [batch, sequence] unless another shape is given."""

    tokens: Tensor
    """int64"""
    position_ids: Tensor
    """int64"""
    attention_mask: Tensor | None
    """bool [batch, 1, sequence, sequence], True where attention is not allowed; None for causal attention"""
    labels: Tensor
    """int64, the token that follows each token"""
    loss_mask: Tensor
    """float32"""
    documents: PackedDocuments | None
    """the documents within which tokens attend; None if tokens attend to the whole sample"""


Blend = tuple[list[str], list[float] | None]
"""Prefixes of datasets, and their weights."""

_TENSORS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")
"""The tensors of a micro-batch, which have the names of `GPTDataset`."""


def get_batch(data_iterator: Iterator[dict[str, Any]] | None, micro_batch_size: int) -> Batch:
    """Return the next micro-batch, complete on every pipeline stage.

    Megatron's `get_batch` gives no tokens to later stages. Here every stage reads the data, which costs no
    communication over the pipeline: all stages of a data-parallel rank draw the same samples.

    Args:
        data_iterator: Samples; None on ranks that are not the first of their tensor-parallel group.
        micro_batch_size: Number of samples in each micro-batch.
    """
    args = get_args()
    has_documents = args.dataloader_inter_document_masking
    data = next(data_iterator) if data_iterator is not None else {}
    batch: dict[str, Any] = dict.fromkeys((*_TENSORS, "cu_seqlens", "max_seqlen"))
    batch |= {key: data[key].cuda(non_blocking=True) for key in batch if data.get(key) is not None}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=has_documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=cast(torch.distributed.ProcessGroup, mpu.get_tensor_model_parallel_group()),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        # Megatron leaves tensors out on later stages of a pipeline, so report a pipeline of one stage.
        pipeline_model_parallel_size=1,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    documents = None
    if has_documents:
        # The rank that read the data need not wait for the device.
        cu_seqlens = data["cu_seqlens"] if data else batch["cu_seqlens"].cpu()
        reads_on_host = args.transformer_impl == "local"
        documents = PackedDocuments.of_samples(cu_seqlens, batch["tokens"].device, reads_on_host=reads_on_host)
    return Batch(**{key: batch[key] for key in _TENSORS}, documents=documents)


def token_losses(model: torch.nn.Module, batch: Batch, padding_mask: Tensor | None = None) -> Tensor:
    """Run the forward pass of one pipeline stage; on the last stage, return the loss of every token [batch, sequence].

    Args:
        model: The stage.
        batch: The micro-batch.
        padding_mask: bool [batch, sequence], True for tokens that routers must not count; None if there are none.
    """
    return model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.documents,
        padding_mask=padding_mask,
    )


def build_datasets(num_samples: list[int] | list[None], vp_stage: int | None = None) -> list[GPTDataset | None]:
    """Build the train, validation and test datasets on the first tensor-parallel rank of every pipeline stage.

    Args:
        num_samples: Number of samples of each dataset that Megatron asks for; None for one epoch.
        vp_stage: Unused; part of the signature that `pretrain` asks for.

    Returns:
        The datasets; None for a dataset without a share, and on ranks that do not read data.
    """
    console.load("building the datasets")
    return _build(samples_to_request(get_args(), num_samples), *get_blend_and_blend_per_split(get_args()))


# Megatron's training loop calls the function on all ranks, not only on the first stage, if the attribute is set.
vars(build_datasets)["is_distributed"] = True


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
        return _build(one_epoch, None, None)[split.value]
    of_split: Blend | None = blend if blend_per_split is None else blend_per_split[split.value]
    # Build each dataset by itself, and leave out datasets without a sample.
    datasets = []
    for prefix in of_split[0] if of_split else ():
        alone: Blend = ([prefix], None)
        per_split = blend_per_split and [alone if each is split else None for each in Split]
        dataset = _build(one_epoch, None if per_split else alone, per_split)[split.value]
        if dataset is not None and len(dataset):
            datasets.append(dataset)
        else:
            console.say(f"note: dataset {prefix} has no sample in the {split.name} split")
    if len(datasets) < 2:
        return next(iter(datasets), None)
    # Sort all samples by their relative place in their dataset.
    places = np.concatenate([(np.arange(len(dataset)) + 0.5) / len(dataset) for dataset in datasets])
    return Subset(ConcatDataset(datasets), places.argsort(kind="stable").tolist())


def _build(
    num_samples: Sequence[int | None], blend: Blend | None, blend_per_split: list[Blend | None] | None
) -> list[GPTDataset | None]:
    """Build the datasets of all splits, see `build_datasets`, of one blend or of a blend for each split."""
    args = get_args()
    dataset, config = MockGPTDataset if args.mock_data else GPTDataset, GPTDatasetConfig
    if args.fim_data:
        dataset, config = FillInMiddleDataset, GPTFIMDatasetConfig
    # Megatron's configuration names most settings like its arguments.
    settings = {field.name: getattr(args, field.name) for field in fields(config) if field.name in args}
    settings |= token_settings(args) if args.fim_data else {}
    settings |= {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "path_to_cache": args.data_cache_path,
        "tokenizer": get_tokenizer(),
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "inter_document_masking": args.dataloader_inter_document_masking,
    }
    builder = BlendedMegatronDatasetBuilder(
        dataset,
        cast(list[int], num_samples),  # Megatron annotates int but takes None, too.
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        config(**settings),
    )
    return cast(list[GPTDataset | None], builder.build())


def loss_function(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the masked sum of the losses of a micro-batch, in the form that Megatron's schedules take.

    Args:
        loss_mask: float [batch, sequence].
        output_tensor: Loss of every token, [batch, sequence].

    Returns:
        The sum of the losses, the number of tokens in the sum (int32), and both as `lm loss` for the log. Under context
        parallelism, the first sum is weighted, see `weight_of_rank`.

    Raises:
        RuntimeError: The loss is NaN or infinite, and `--check-for-nan-in-loss-and-grad` is on.
    """
    loss = torch.sum(output_tensor.float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        get_rerun_state_machine().validate_result(
            loss, lambda value: not torch.isfinite(value), "found NaN or Inf in local forward loss calculation"
        )
    logged = {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
    if get_args().context_parallel_size > 1 and not get_args().calculate_per_token_loss:
        cp_group = cast(torch.distributed.ProcessGroup, mpu.get_context_parallel_group())
        loss = loss * weight_of_rank(num_tokens, cp_group)
    return loss, num_tokens, logged


def weight_of_rank(num_tokens: Tensor, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """Return the factor of a rank's summed losses that makes all tokens of a micro-batch weigh the same.

    Megatron's schedules divide the sum by the rank's number of tokens, and gradients are averaged over ranks. Tokens of
    a rank on which a loss mask leaves fewer tokens would weigh more.

    Args:
        num_tokens: the tokens of this rank that count, int scalar.
        cp_group: the ranks that share the sequences.
    """
    total = num_tokens.float()
    torch.distributed.all_reduce(total, group=cp_group)
    return num_tokens * cp_group.size() / total.clamp(min=1)


@torch.no_grad()
def losses_of_all(
    args: Namespace,
    model: torch.nn.Module,
    sample: Callable[[int], dict[str, Any]] | None,
    num_samples: int,
    description: str,
) -> Iterator[tuple[int, Batch, Tensor]]:
    """Compute the loss of every token of a dataset, with a progress bar; all ranks must iterate over the result.

    Args:
        args: Megatron's arguments; each rank takes `micro_batch_size` samples in each step.
        model: This rank's part of the model.
        sample: Returns a sample by its index, in the form of Megatron's `GPTDataset`; None on ranks that do not read
            data.
        num_samples: Number of samples of the dataset, on all ranks.
        description: Label of the progress bar.

    Yields:
        For each step, the index of this rank's first sample, the micro-batch, and the loss of every token
        [batch, sequence]; nothing on ranks that are not on the last pipeline stage.
    """
    model.eval()
    samples_a_step = args.micro_batch_size * mpu.get_data_parallel_world_size()
    first_of_rank = mpu.get_data_parallel_rank() * args.micro_batch_size
    steps = range(0, num_samples, samples_a_step)
    start = 0

    def micro_batches(sample: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield micro-batches of this data-parallel rank; together, all ranks cover the dataset exactly once.

        In the last step, a rank may have less than a micro-batch of samples left, or none. All ranks take part in the
        step nevertheless, since they share the experts. They fill up with copies of the last sample whose loss does
        not count.
        """
        for first in (step + first_of_rank for step in steps):
            samples = [sample(min(index, num_samples - 1)) for index in range(first, first + args.micro_batch_size)]
            for copy in samples[max(0, num_samples - first) :]:
                copy["loss_mask"] = torch.zeros_like(copy["loss_mask"])
            yield default_collate(samples)

    def forward_step(data_iterator: Iterator, model: torch.nn.Module) -> tuple:
        """Run one micro-batch forward; return the losses and a function that keeps them with the micro-batch."""
        batch = get_batch(data_iterator, args.micro_batch_size)
        # In a step that is filled up, samples beyond the last one are padding for the routers. All ranks pass a mask in
        # that step, since they dispatch together.
        is_padding = None
        if args.num_experts and start + samples_a_step > num_samples:
            indices = start + first_of_rank + torch.arange(len(batch.tokens), device=batch.tokens.device)
            is_padding = (indices >= num_samples).unsqueeze(1).expand_as(batch.tokens)
        return token_losses(model, batch, is_padding), lambda losses, non_loss_data: (batch, losses)

    # Megatron's schedules take None, too, on ranks that do not read data.
    data_iterator: Any = micro_batches(sample) if sample is not None else None
    for start in progress_bar(steps, description, "batch"):
        collected = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        for batch, losses in collected:
            yield start + first_of_rank, batch, losses


def sum_over_ranks(values: Tensor, *, by_tensor_rank: bool = False) -> Tensor:
    """Add up, in place, the values of each rank; a collective call of all ranks.

    Args:
        values: Zeros on ranks that have nothing to add, such as ranks that are not on the last pipeline stage.
        by_tensor_rank: Whether the values of all ranks of a tensor-parallel group count. By default they are equal, and
            the values of the first rank count.
    """
    if mpu.get_tensor_model_parallel_rank() != 0 and not by_tensor_rank:
        values.zero_()
    torch.distributed.all_reduce(values)
    return values
