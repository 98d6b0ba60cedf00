"""Batches and datasets, with the token ids on every pipeline stage."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

_KEYS = ("tokens", "position_ids", "attention_mask", "labels", "loss_mask")


class Batch(NamedTuple):
    """One micro-batch on one rank; all tensors are [batch, sequence] unless said otherwise."""

    tokens: Tensor
    """int64"""
    position_ids: Tensor
    """int64"""
    attention_mask: Tensor | None
    """bool [batch, 1, sequence, sequence], True where attention is not allowed; None: causal"""
    labels: Tensor
    """int64, the next token of each"""
    loss_mask: Tensor
    """float32"""


def get_batch(data_iterator: Iterator[dict[str, Any]] | None) -> Batch:
    """The next micro-batch, whole on every pipeline stage.

    Megatron's `get_batch` gives later stages no tokens. Here every stage reads the data itself, which costs no
    communication over the pipeline: sampling is the same for all stages of a data-parallel rank.
    """
    args = get_args()
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        data = next(data_iterator)
        batch = {key: data[key].cuda(non_blocking=True) if data.get(key) is not None else None for key in _KEYS}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        # As a pipeline of one stage: all tensors go to all tensor-parallel ranks.
        pipeline_model_parallel_size=1,
    )
    batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group())
    return Batch(**{key: batch[key] for key in _KEYS})


def token_losses(model: torch.nn.Module, batch: Batch, padding_mask: Tensor | None = None) -> Tensor:
    """Forward pass of one pipeline stage: on the last one the loss of every token, [batch, sequence].

    Args:
        model: the stage.
        batch: the micro-batch.
        padding_mask: bool [batch, sequence], True for tokens that routers shall not count; None: there are none.
    """
    return model(
        batch.tokens,
        batch.position_ids,
        batch.attention_mask,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        padding_mask=padding_mask,
    )


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None):
    """Build the datasets of Megatron's `pretrain_gpt.py` on the first tensor-parallel rank of every pipeline stage.

    Args:
        num_samples: how many samples of train, validation and test data the run will take.
        vp_stage: unused; part of the signature that `pretrain` asks for.
    """
    print_rank_0("> building train, validation, and test datasets for MaskMoE ...")
    datasets = build_datasets(get_args(), num_samples)
    print_rank_0("> finished creating MaskMoE datasets ...")
    return datasets


# Megatron's training loop builds datasets on all ranks if the provider says that it can be.
train_valid_test_datasets_provider.is_distributed = True


def build_datasets(args, num_samples: list[int | None]) -> list[GPTDataset | None]:
    """Build the train, validation and test datasets that the command line describes, on ranks that read data.

    Args:
        args: Megatron's arguments.
        num_samples: of each; None for one epoch.
    """
    return BlendedMegatronDatasetBuilder(
        MockGPTDataset if args.mock_data else GPTDataset,
        num_samples,
        lambda: mpu.get_tensor_model_parallel_rank() == 0,
        dataset_config_from_args(args),
    ).build()


def dataset_config_from_args(args) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its command line arguments."""
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
    """Masked sum of the losses of a micro-batch, in the form that Megatron's schedules take.

    Args:
        loss_mask: float [batch, sequence].
        output_tensor: the loss of every token, [batch, sequence].

    Returns:
        the sum of the losses, the number of tokens in it (int32), and both as `lm loss` for the log.

    Raises:
        RuntimeError: the loss is NaN or infinite, and `--check-for-nan-in-loss-and-grad` is on.
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    num_tokens = mask.sum().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.to(loss.dtype)])}
