"""Datasets and micro-batches, with the token ids on every pipeline stage."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, cast

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from maskmoe.megatron_compat.globals import get_args, get_tokenizer

_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


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


def get_batch(data_iterator: Iterator[dict[str, Any]] | None) -> Batch:
    """Return the next micro-batch, complete on every pipeline stage.

    Megatron's `get_batch` gives no tokens to later stages. Here every stage reads the data, which costs no
    communication
    over the pipeline: all stages of a data-parallel rank draw the same samples.

    Args:
        data_iterator: Samples; None on ranks that are not the first of their tensor-parallel group.
    """
    args = get_args()
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        assert data_iterator is not None
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) if data.get(key) is not None else None for key in _KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=cast(torch.distributed.ProcessGroup, mpu.get_tensor_model_parallel_group()),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        # Megatron leaves tensors out on later stages of a pipeline, so report a pipeline of one stage.
        pipeline_model_parallel_size=1,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return Batch(**{key: batch[key] for key in _KEYS})


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
        padding_mask=padding_mask,
    )


class _DatasetsProvider(Protocol):
    """A function that builds datasets, as Megatron's training loop takes it."""

    is_distributed: bool

    def __call__(self, num_samples: list[int], vp_stage: int | None = None) -> list[GPTDataset | None]: ...


def _build_and_announce_datasets(num_samples: list[int], vp_stage: int | None = None) -> list[GPTDataset | None]:
    """Build the datasets of Megatron's `pretrain_gpt.py` on the first tensor-parallel rank of every pipeline stage.

    Args:
        num_samples: Number of train, validation and test samples that the run will take.
        vp_stage: Unused; part of the signature that `pretrain` asks for.
    """
    print_rank_0("> building train, validation, and test datasets for MaskMoE ...")
    datasets = build_datasets(get_args(), num_samples)
    print_rank_0("> finished creating MaskMoE datasets ...")
    return datasets


train_valid_test_datasets_provider = cast(_DatasetsProvider, _build_and_announce_datasets)
# Megatron's training loop calls the provider on all ranks, not only on the first stage, if the attribute is set.
train_valid_test_datasets_provider.is_distributed = True


def build_datasets(args: Namespace, num_samples: list[int] | list[None]) -> list[GPTDataset | None]:
    """Build the train, validation and test datasets of the command line; None on ranks that do not read data.

    Args:
        args: Megatron's arguments.
        num_samples: Number of samples of each dataset; None for one epoch.
    """
    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        cast(list[int], num_samples),  # Megatron annotates int but takes None, too.
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        dataset_config_from_args(args),
    )
    return cast(list[GPTDataset | None], builder.build())


def dataset_config_from_args(args: Namespace) -> GPTDatasetConfig:
    """Return Megatron's dataset configuration for its command line arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
    )


def loss_function(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the masked sum of the losses of a micro-batch, in the form that Megatron's schedules take.

    Args:
        loss_mask: float [batch, sequence].
        output_tensor: Loss of every token, [batch, sequence].

    Returns:
        The sum of the losses, the number of tokens in the sum (int32), and both as `lm loss` for the log.

    Raises:
        RuntimeError: The loss is NaN or infinite, and `--check-for-nan-in-loss-and-grad` is on.
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=cast(Any, is_bad),
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
